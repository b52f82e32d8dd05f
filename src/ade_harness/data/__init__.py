"""Images, annotations and label conventions of ADE20K; no knowledge of models."""
