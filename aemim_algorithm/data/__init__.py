"""Images: converting them to MDS shards, streaming them, and the transforms in between."""
