"""Embeddings on disk, each found by the hash of its text.

`<root>/<key>/` holds the vectors of one encoding. It can be read with pyarrow and json alone:

    manifest.json       everything that changes a vector; the key is its sha256
    <sha256>.arrow      one shard, an Arrow IPC file named by the sha256 of its bytes; what is there is whole
        text    fixed_size_binary(32)      sha256 of the text as UTF-8
        vector  fixed_size_list(type, dim) unit vector; bfloat16 as its bits in uint16, int8 to be multiplied by scale
        norm    float32                    the vector's length before it was made a unit vector
        tokens  int32                      what the model saw of the text, special tokens included; 0: not known
        cut     bool                       the model did not see all of it
        metadata: storage, cosine (of what is stored to fp32, at worst), scale (JSON list, int8 only)
    index/              where each text is, as .npy: made of the shards, and made again where it is missing
    .lock, .running     who encodes into it, and where a cluster's work folder is

A shard is written aside, synced and renamed. There is no other state: a kill leaves whole shards and a part.
"""
