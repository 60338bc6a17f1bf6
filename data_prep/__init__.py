"""Videos to shards: read a source, verify and encode every video, pack plain WebDataset tars, write the manifest.

The way of one video: `sources` lists it -> `encode` decodes it completely and encodes it (in a worker process) ->
`pack` writes it into a tar and records the shard in the journal (in a worker process) -> `pipeline` writes the manifest
when all shards stand. Start reading at `pipeline.shard_dataset`.
"""
