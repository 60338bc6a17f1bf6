"""Videos to shards: read a source, verify and encode every video, pack plain WebDataset tars, write the manifest.

The way of one video: `sources` lists it -> `encode` decodes it completely and encodes it (in a worker process) ->
`pack` writes it into a tar (in a worker process) -> `pipeline` records the shard in the journal and, when all
shards stand, writes the manifest. Start reading at `pipeline.shard_dataset`.
"""
