"""Operations with an official order and faster forms."""
