"""Files that keep to the grammar of their format and lie within it: each part is well formed, what it says need not be."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from typing import Any

from tests.hostile.mutations import ODD

_SIZES = (0, 1, 7, 40, 60, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def png(seed: int) -> bytes:
    """Return a PNG whose chunks have right lengths and checksums: header, order, palette and pixels are anything."""
    rng = random.Random(seed)
    width, height = (rng.choice(_SIZES) for _ in range(2)) if rng.random() < 0.3 else (60, 40)
    depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))
    interlaced = rng.choice((0, 0, 0, 1, 2))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    row = 1 + (60 * depth * channels + 7) // 8
    filters = rng.choice((b"\0", b"\1", b"\2", b"\3", b"\4", b"\5"))
    pixels = (filters + rng.randbytes(row - 1)) * 40
    pixels = rng.choice((pixels, pixels, pixels, pixels[: len(pixels) // 2], pixels * 3, b""))
    packed = zlib.compress(pixels)
    if rng.random() < 0.1:
        packed = packed[: len(packed) // 2]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))]
    for _ in range(rng.randrange(4)):
        parts.append(
            rng.choice((
                (b"PLTE", rng.randbytes(3 * rng.choice((0, 1, 2, 150, 256, 300)))),
                (b"PLTE", rng.randbytes(rng.choice((1, 4)))),
                (b"tRNS", rng.randbytes(rng.randrange(8))),
                (b"tEXt", b"k\0" + rng.randbytes(50)),
                (b"zTXt", b"k\0\0" + zlib.compress(b"x" * rng.choice((10, 2**22)))),
                (b"iCCP", b"p\0\0" + zlib.compress(rng.randbytes(200))),
                (b"eXIf", b"II*\0" + rng.randbytes(20)),
                (b"gAMA", rng.randbytes(4)),
                (b"acTL", struct.pack(">II", rng.choice(_SIZES), 0)),
                (b"ABCD", b"a critical chunk that nobody knows"),
            ))
        )  # fmt: skip
    half = len(packed) // 2
    parts += [(b"IDAT", packed)] if rng.random() < 0.7 else [(b"IDAT", packed[:half]), (b"IDAT", packed[half:])]
    parts.append((b"IEND", b""))
    if rng.random() < 0.15:
        rng.shuffle(parts)
    if rng.random() < 0.1:
        parts.insert(rng.randrange(len(parts)), rng.choice(parts))
    chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + rng.choice((b"", b"", rng.randbytes(30)))


def jpeg(seed: int, good: bytes) -> bytes:
    """Return a JPEG of the segments of a good one, some with other contents, in another order, or beside new ones."""
    rng = random.Random(seed)
    segments, place = [], 2
    while good[place + 1] != 0xDA:  # the scan
        length = int.from_bytes(good[place + 2 : place + 4], "big")
        segments.append((good[place + 1], good[place + 4 : place + 2 + length]))
        place += 2 + length
    scan = good[place:]
    for _ in range(rng.randint(1, 3)):
        number = rng.randrange(len(segments))
        kind, body = segments[number]
        change = rng.randrange(6)
        if change == 0 and kind in (0xC0, 0xC2):  # the frame: precision, height, width, components
            height, width = (rng.choice(_SIZES) & 0xFFFF for _ in range(2))
            body = struct.pack(">BHH", rng.choice((8, 12, 0)), height, width) + body[5:]
            segments[number] = kind, body
        elif change == 1:
            segments[number] = rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xDB, 0xC4, 0xDD, 0xFE)), body
        elif change == 2:
            segments.insert(
                number, (rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE)), rng.randbytes(rng.randrange(90)))
            )
        elif change == 3:
            rng.shuffle(segments)
        elif change == 4:
            del segments[number]
            if not segments:
                break
        else:
            segments[number] = kind, body[: len(body) // 2] + rng.randbytes(len(body) - len(body) // 2)
    if rng.random() < 0.3:
        scan = scan[: rng.randrange(len(scan))] + rng.choice((b"", b"\xff\xd9"))
    return (
        b"\xff\xd8" + b"".join(bytes((255, k)) + struct.pack(">H", len(b) + 2) + b for k, b in segments) + scan
    )  # fmt: skip


def npy(seed: int) -> bytes:
    """Return a NumPy file whose header is a dictionary of the right kind, or nearly."""
    rng = random.Random(seed)
    described = rng.choice(
        ("'<i4'", "'|u1'", "'<f4'", "'>i8'", "'|O'", "'<U4'", "[('a', '<i4')]", "'<c8'", "'|V3'", "'<f2'", "7")
    )
    shape = rng.choice(
        (
            "(40, 60)",
            "(40, 60,)",
            "(2400,)",
            "()",
            "(0, 60)",
            "(-1, 60)",
            "(9999999, 9999999)",
            "(150, 10, 15)",
            "[40, 60]",
            "(40, 60.0)",
            "('a', 2)",
        )
    )
    order = rng.choice(("False", "True", "0", "None"))
    more = rng.choice(("", "", "", ", 'more': 1", ", 'shape': (1,)", ", **{}"))
    header = f"{{'descr': {described}, 'fortran_order': {order}, 'shape': {shape}{more}}}".encode()
    header += b" " * rng.choice((0, 1, 10_000)) + b"\n"
    if rng.random() < 0.2:  # scores as they should be
        described, header = "'<f2'", b"{'descr': '<f2', 'fortran_order': False, 'shape': (150, 10, 15)}\n"
    version = rng.choice((b"\x01\0", b"\x01\0", b"\x02\0", b"\x03\0", b"\x09\0"))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    body = pickle.dumps([1]) if "O" in described else rng.randbytes(rng.choice((9600, 9600, 2400, 10, 0, 45_000)))
    return b"\x93NUMPY" + version + length + header + body  # fmt: skip


def archive(seed: int, files: dict[str, bytes]) -> bytes:
    """Return a zip of a data set's files, with odd names beside or instead of them, and headers that lie."""
    rng = random.Random(seed)
    odd = ("../evil", "/etc/evil", "a/../../evil", "C:\\evil", "", ".", "images", "images/validation/", "\u202egnp", "con", "a" * 300,
           "images/validation/ADE_val_00001000.jpg/x", "images\0hidden", "ADEChallengeData2016/images/validation/.jpg")  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data in files.items():
            chosen = name if rng.random() < 0.9 else rng.choice((rng.choice(odd), name.upper(), name + " "))
            information = zipfile.ZipInfo(chosen)
            information.compress_type = rng.choice(
                (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            )
            if rng.random() < 0.05:
                information.external_attr = 0o120777 << 16  # a link
            made.writestr(information, data if rng.random() < 0.95 else b"\0" * 2**18)
            if rng.random() < 0.05:
                made.writestr(information, b"a second of the same name")
    data = bytearray(buffer.getvalue())
    for _ in range(rng.randrange(3)):  # of central headers: flags (encrypted), the method, sizes
        places = [found.start() for found in re.finditer(b"PK\x01\x02", data)]
        place = rng.choice(places)
        offset, value = rng.choice(
            ((8, b"\x01\0"), (10, b"\x63\0"), (20, b"\xff" * 4), (24, b"\xff\xff\xff\x7f"), (42, b"\xff" * 4))
        )
        data[place + offset : place + offset + len(value)] = value
    return bytes(data)  # fmt: skip


def safetensors(seed: int) -> bytes:
    """Return a safetensors file with a header of JSON of the right kind, or nearly."""
    rng = random.Random(seed)
    content: dict[str, Any] = {}
    for name in rng.sample(("weight", "bias", "a.b", "", "__metadata__", "\u202e", "x" * 500), rng.randint(1, 4)):
        content[name] = rng.choice((
            {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            {"dtype": rng.choice(("F16", "BF16", "F8_E4M3", "C64", "BOOL", "U64", "NONE")), "shape": [4], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [rng.choice(_SIZES), rng.choice(_SIZES)], "data_offsets": [0, 16]},
            {"dtype": "F32", "shape": [2, 2], "data_offsets": [rng.choice(_SIZES), rng.choice(_SIZES)]},
            {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            rng.choice(ODD),
        ))  # fmt: skip
    header = json.dumps(content).encode("utf-8", "surrogatepass")
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + header + rng.randbytes(rng.choice((16, 16, 0, 100)))


def pickled(seed: int) -> bytes:
    """Return a pickle of opcodes that follow each other as they please; some name functions that must not be called."""
    rng = random.Random(seed)
    parts = [b"\x80\x04"] if rng.random() < 0.8 else []
    for _ in range(rng.randint(1, 14)):
        parts.append(
            rng.choice((
                b"}", b"]", b"(", b")", b"N", b"\x88", b"K\x05", b"\x8c\x06weight", b"X\x04\0\0\0bias", b"\x94", b"2", b"0", b"e", b"u", b"s",
                b"t", b"\x85", b"\x86", b"h\0", b"q\0", b"cposix\nsystem\n", b"\x8c\x05posix\x8c\x06system\x93", b"R", b"b", b"\x81", b"o",
                b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\nndarray\n", b"\x8c\x14touch hostile_owned", b"Q", b"P1\n",
                b"B\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"I99999999999999999999\n", b"L" + b"9" * 5000 + b"L\n", b"\x82\x01", b"i__main__\nX\n",
            ))
        )  # fmt: skip
    return b"".join([*parts, *([b"."] if rng.random() < 0.9 else [])])


def yaml_text(seed: int, keys: tuple[str, ...]) -> str:
    """Return a YAML mapping with some of these keys, and values in every style that YAML has."""
    rng = random.Random(seed)

    def value(depth: int) -> str:
        kind = rng.randrange(16 if depth < 3 else 12)
        plain = ("1", "-1", "1e400", ".nan", "-.inf", "0x1F", "0o17", "1_000", "yes", "No", "~", "null", "''", '"\\u202e"', "2026-11-30", "12:30:45",
                 "${oc.env:HOME}", "${run.dir}", "${unclosed", "!!python/name:os.system", "!!binary aGk=", "!!set {a, b}", "!unknown x", "*nowhere",
                 "&a x", "|\n    text", ">-\n    text", "'it''s'", '"\\x00"', "@x", "`x`", "%x", "- x", "? x", "<<: *a", "[", "{", "\t1")  # fmt: skip
        if kind < 12:
            return rng.choice(plain)
        if kind < 14:
            return "[" + ", ".join(value(depth + 1) for _ in range(rng.randrange(4))) + "]"
        return "{" + ", ".join(f"k{i}: {value(depth + 1)}" for i in range(rng.randrange(4))) + "}"

    lines = [f"{key}: {value(0)}" for key in rng.sample(keys, rng.randint(1, min(6, len(keys))))]
    if rng.random() < 0.2:
        lines.insert(
            rng.randrange(len(lines) + 1),
            rng.choice(("---", "...", "# text", "%YAML 9.9", "? [a]\n: b", "key without a colon", lines[0])),
        )
    return "\n".join(lines) + rng.choice(("\n", "", "\r\n", "\n\0"))  # fmt: skip


def override(seed: int, keys: tuple[str, ...]) -> str:
    """Return an override in Hydra's grammar, or nearly."""
    rng = random.Random(seed)
    prefix = rng.choice(("", "", "", "+", "++", "~"))
    key = rng.choice(
        (*keys, "model", "inference", "dataset", "hydra.job.name", "x", "", "model.x.y", "model@x", "/model")
    )
    values = ("1", "-1", "1e999", "nan", "true", "null", "''", '"x"', "[1,2]", "[", "{a:1}", "{a:{b:[1,{c:2}]}}", "choice(1,2)", "range(0,9999999999)",
              "glob(*)", "interval(0,1)", "sort(3,1)", "shuffle(1,2)", "int(x)", "str(1)", "json_str(1)", "extend_list(1)", "a,b,c", "a=b=c", "${oc.env:HOME}",
              "${a", "\\$", "a b", "a\tb", "日本", "\u202e", "@file", "(", "'", '"', "a:b", "#", "%", "9" * 400, "a" * 5000)  # fmt: skip
    return f"{prefix}{key}" + ("" if rng.random() < 0.1 else f"={rng.choice(values)}")


def reply(seed: int, body: bytes, kind: str) -> bytes:
    """Return what a server may send: a status line, headers and a body that agree with each other, or do not."""
    rng = random.Random(seed)
    status = rng.choice((b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK", b"HTTP/1.0 200", b"HTTP/1.1 204 No", b"HTTP/1.1 302 Found",
                         b"HTTP/1.1 404 \x1b[2J", b"HTTP/1.1 99 x", b"HTTP/1.1 100 Continue", b"HTTP/9.9 200 OK", b"ICY 200 OK", b"", b"\xff\xfe"))  # fmt: skip
    headers = [
        f"Content-Type: {rng.choice((kind, kind, 'text/html', 'image/jpeg', '', kind + '; charset=x'))}".encode()
    ]
    length = rng.choice((len(body), len(body), len(body) // 2, 2 * len(body), 0, 2**40, -1))
    if rng.random() < 0.8:
        headers.append(f"Content-Length: {length}".encode())
    for _ in range(rng.randrange(3)):
        headers.append(
            rng.choice((
                b"Location: http://127.0.0.1:1/elsewhere", b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Label-Encoding: official",
                b"Label-Encoding: \x1b]0;owned\x07", b"X: " + b"x" * 70_000, b"no colon", b": empty", b"Retry-After: 99999999", b"Set-Cookie: a=b",
            ))
        )  # fmt: skip
    if b"Transfer-Encoding: chunked" in headers and rng.random() < 0.7:
        size = rng.choice((f"{len(body):x}", "-5", "ffffffffffffffff", "zz", ""))
        body = size.encode() + b"\r\n" + body + b"\r\n0\r\n\r\n"
    return b"\r\n".join([status, *headers, b"", body])


def request(seed: int, image: bytes) -> bytes:
    """Return what a client may send: a request line, headers and a body that agree with each other, or do not."""
    rng = random.Random(seed)

    def mostly(good: Any, *odd: Any) -> Any:
        return good if rng.random() < 0.8 else rng.choice(odd)

    method = mostly(b"POST", b"GET", b"HEAD", b"PUT", b"post", b"", b"\x16\x03\x01", b"G" * 70_000)
    path = mostly(
        b"/predict",
        b"/info",
        b"/",
        b"http://[x",
        b"/predict?a=\x1b[2J",
        b"//predict",
        b"*",
        b"/" + b"a" * 70_000,
        b"\xff",
    )
    version = mostly(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.1.1", b"HTTP/-1.1", b"", b"FTP/1.1")
    body = mostly(image, image[: len(image) // 2], b"", rng.randbytes(200), image * 3)
    size = str(len(body))
    length = mostly(
        size, str(len(body) // 2), str(2 * len(body) + 1), "0", "-1", str(2**40), "9" * 5000, "+" + size, ""
    )
    kind = mostly("image/png", "text/html", "", "image/png;" * 50, "image/jpeg")
    headers = [b"Host: a", f"Content-Type: {kind}".encode()]
    headers += mostly([f"Content-Length: {length}".encode()], [])
    if rng.random() < 0.4:
        headers.append(
            rng.choice((
                b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Accept: application/x-npy", b"Accept: nothing/at-all", b"X: " + b"x" * 70_000,
                b"Authorization: Bearer \xff\xfe", b"no colon", b": empty", b" folded", b"Connection: keep-alive", b"Content-Length: 5", b"A: \x1b]0;owned\x07",
                b"\r\n".join(b"H%d: 1" % i for i in range(300)),
            ))
        )  # fmt: skip
    rng.shuffle(headers)
    following = mostly(b"", b"\r\n\r\n", b"GET /info HTTP/1.1\r\n\r\n")
    return b"\r\n".join([b" ".join((method, path, version)), *headers, b"", body]) + following
