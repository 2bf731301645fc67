"""Helpers that several test folders share; none of these modules contains a test.

Import them as `from support.rank_pool import run_ranks`: pyproject.toml puts tests/ on pytest's path, and
`rank_pool` puts it on the path of the ranks, which unpickle functions and arguments by these module names.

Processes
    rank_pool            run a function on several ranks
    rank_pool_preload    modules that are imported before the ranks start
    commands             run a command as a user would
    ports                a free TCP port
Subjects under test
    tiny_models          Transformers of a few thousand parameters
    engine_scenarios     an engine, a model and batches, trained for a few steps
    small_runs           whole runs on a small text, and their logged losses and events
    checkpoint_cli       calls of `distft checkpoint`
References to compare with
    plain_deepspeed      training with DeepSpeed alone
    huggingface_models   models of transformers, and distft models with the same weights
Damage and fault injection
    damage               flip a bit of a file
    faulty_disk          fails, or kills the process, at a chosen operation on the disk
    faulty_proxy         TCP proxy that drops connections and refuses HTTP requests
    s3_server            S3 server whose requests can fail
"""
