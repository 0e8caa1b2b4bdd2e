"""Every option of CrossPool, one row each: field, type, unit, default, range, help, SGLang's name.

The command line (:mod:`crosspool.config.flags`), the deployment file
(:mod:`crosspool.config.deployment_file`), the example file (:mod:`crosspool.config.example`) and
the fields of :class:`~crosspool.config.deployment.Deployment` come from these rows. To add an
option, add a row, its consumer and a test, and print the example file again. Options that only
SGLang's front end reads are in :mod:`crosspool.config.sglang_flags`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from crosspool.config.device import Device
from crosspool.config.option import Option, options_of
from crosspool.models.spec import KVCacheDType

_MODELS = "models"
_POOLS = "pools"
_STEPS = "batches and steps"
_REQUESTS = "requests"
_HOSTS = "hosts"
_SERVER = "server"

Keep = Literal["pinned", "demand", "asleep"]
"""When a model's weights are in memory."""

Experts = Literal["all", "demand"]
"""Which routed experts of a resident model are in memory."""

# A formatter would give every row ten lines.
# fmt: off


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the user asks for it."""

    path: Annotated[str, Option(
        "Local folder with the model's config.json, safetensors files and tokenizer, or a GGUF "
        "file.",
        sglang="model_path", example="python/crosspool/demo/tiny-deepseek-v2")]
    name: Annotated[str | None, Option(
        "Name that clients give as `model`. If none is given, it is the folder's name.",
        sglang="served_model_name", example="deepseek")] = None
    context_length: Annotated[int | None, Option(
        "Longest sequence, prompt and output together. If none is given, it is the one in "
        "config.json.",
        unit="tokens", sglang="context_length", example=1024)] = None
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], Option(
        "Data type of weights, and of KV cache where kv_cache_dtype is auto; auto takes the one in "
        "config.json.",
        sglang="dtype", example="float32")] = "auto"
    kv_cache_dtype: Annotated[KVCacheDType, Option(
        "Data type to which keys and values are rounded in the KV cache, without a scale; auto is "
        "the model's dtype. Floats of 8 bits are for CPUs.",
        sglang="kv_cache_dtype", example="fp8_e4m3")] = "auto"
    quantization: Annotated[Literal["int4", "int8", "fp8"] | None, Option(
        "Format to which the matrices of a checkpoint of floats are rounded when they are read: "
        "int4 in groups of 32, int8 and fp8 with a scale for each row. If none is given, weights "
        "stay as the checkpoint stores them.",
        sglang="quantization", example="int8")] = None
    kv_pool_devices: Annotated[tuple[Device, ...] | None, Option(
        "Devices of the KV pool that hold this model's attention part and serve its requests. If "
        "none are given, all of them do.",
        unit="devices")] = None
    weight_pool_devices: Annotated[tuple[Device, ...] | None, Option(
        "Devices of the weight pool that share this model's FFN weights. If none are given, all of "
        "them do.",
        unit="devices", example="cpu")] = None
    kv_floor_bytes: Annotated[int, Option(
        "KV memory, over the whole pool, that requests of other models never take.",
        unit="bytes", example="8MiB")] = 0
    kv_ceiling_bytes: Annotated[int | None, Option(
        "Most KV memory, over the whole pool, that this model's requests may take. If none is "
        "given, they may take all of it.",
        unit="bytes", example="128MiB")] = None
    keep: Annotated[Keep, Option(
        "When the model's weights are in memory: pinned is always; demand is from the start while "
        "there is room, and whenever requests come; asleep is only once requests have come.",
        )] = "demand"
    experts: Annotated[Experts, Option(
        "Which routed experts are in memory while the model is: all of them, or on demand those "
        "that tokens choose most, in expert_pool_bytes together with those of other models.",
        )] = "all"
    ttl: Annotated[float | None, Option(
        "Time without a request after which the model sleeps. If none is given, it sleeps when "
        "another model needs its room.",
        unit="s", least=0, example=3600)] = None
    priority: Annotated[int, Option(
        "Of two models without requests, the one with the larger priority keeps its weights in "
        "memory longer.",
        least=-(1 << 31), most=(1 << 31) - 1, example=1)] = 0
    sglang: dict[str, Any] = {}
    """Arguments for SGLang of this model alone, by ServerArgs field."""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A server but for its models, as the user asks for it; None where it is left open."""

    models_dir: Annotated[str | None, Option(
        "Folder of which every checkpoint is served, beside the models that are named: DIR/NAME or "
        "DIR/NAME.gguf as NAME, and DIR/ORG/NAME as ORG/NAME.",
        _MODELS)] = None

    kv_pool_devices: Annotated[tuple[Device, ...], Option(
        "Devices that compute attention and hold all KV cache: cpu (every core), cpu:0-7, "
        "cpu:0-3+8-11 or cuda:0, and node1/cpu:0-7 for one of another host; several are separated "
        "by commas.",
        _POOLS, unit="devices")] = (Device("cpu"),)
    weight_pool_devices: Annotated[tuple[Device, ...], Option(
        "Devices that hold the FFN weights and compute with them. They may be those of the KV "
        "pool.",
        _POOLS, unit="devices")] = (Device("cpu"),)
    kv_pool_bytes: Annotated[int | None, Option(
        "Memory for KV cache, over all devices of the KV pool. If none is given, it is 20 % of the "
        "available memory, at most 4GiB; on GPUs, it is what the weights leave.",
        _POOLS, unit="bytes", example="256MiB")] = None
    weight_pool_bytes: Annotated[int | None, Option(
        "Memory for FFN weights, over all devices of the weight pool. If none is given, it is what "
        "the models need. If it is less, models sleep and are woken for their requests.",
        _POOLS, unit="bytes")] = None
    expert_pool_bytes: Annotated[int | None, Option(
        "Part of weight_pool_bytes for the routed experts of models whose experts are in memory on "
        "demand. If none is given, it is what the other FFN weights of all models leave.",
        _POOLS, unit="bytes")] = None
    attention_weight_bytes: Annotated[int | None, Option(
        "Memory for the weights of attention parts, over all devices of the KV pool and beside "
        "kv_pool_bytes. If none is given, it is what all models need.",
        _POOLS, unit="bytes")] = None
    residency_quantum: Annotated[float, Option(
        "Time for which a model that was woken keeps its room while it has requests and other "
        "models wait for the same room.",
        _POOLS, unit="s", least=0.1, most=86400)] = 10.0
    ffn_parallel: Annotated[Literal["tp", "ep"], Option(
        "How several devices share FFN weights: tp gives each a slice of every expert, ep deals "
        "out whole experts.",
        _POOLS)] = "tp"
    page_size: Annotated[int, Option(
        "Size of a KV page, the unit in which a request gets KV memory.",
        _POOLS, unit="tokens", least=1, most=1 << 16, sglang="page_size")] = 16
    chunk_bytes: Annotated[int, Option(
        "Size of a chunk, the unit in which physical memory moves from one model's KV cache to "
        "another's; a multiple of 2MiB.",
        _POOLS, unit="bytes", multiple_of=2 << 20)] = 2 << 20
    promise: Annotated[Literal["worst_case", "growth"], Option(
        "KV memory that a request is promised when it is admitted: worst_case is all that it can "
        "come to need; growth is enough for its prompt and some tokens, and more as it grows.",
        _POOLS)] = "worst_case"
    growth_tokens: Annotated[int, Option(
        "Tokens for which a request is promised memory at a time, where promise is growth.",
        _POOLS, unit="tokens", least=1, most=1 << 31)] = 256
    prefix_cache: Annotated[bool, Option(
        "Computed KV cache is kept for later requests that begin alike, until memory runs short.",
        _POOLS, sglang="disable_radix_cache")] = True

    packed_cache_dir: Annotated[str | None, Option(
        "Folder that keeps the weights of CPU devices as the kernels read them, so that the next "
        "start, or that of one device, need not pack them again. If none is given, it is "
        "~/.cache/crosspool.",
        _POOLS)] = None
    packed_cache_bytes: Annotated[int, Option(
        "Most bytes of the files in that folder; those of other deployments that were not used for "
        "longest go first. 0 keeps none.",
        _POOLS, unit="bytes", least=0)] = 64 << 30

    loop: Annotated[Literal["host", "resident"], Option(
        "What drives the layers: resident is native threads (on a GPU, the GPU itself); host is "
        "Python, the slower reference.",
        _STEPS)] = "resident"
    gpu_links: Annotated[Literal["peer", "nvshmem"], Option(
        "How GPUs exchange hidden states: peer is loads and stores into each other's memory; "
        "nvshmem is for GPUs that cannot reach it.",
        _STEPS)] = "peer"
    lanes: Annotated[int, Option(
        "Batches in flight on each device of the KV pool.",
        _STEPS, least=1, most=256)] = 2
    lease_steps: Annotated[int, Option(
        "Most decode steps that the resident loop makes of one batch before the scheduler decides "
        "again.",
        _STEPS, unit="steps", least=1, most=1 << 16)] = 32
    chunked_prefill_size: Annotated[int, Option(
        "Most prompt tokens of one step.",
        _STEPS, unit="tokens", least=1, most=1 << 20, sglang="chunked_prefill_size")] = 512
    tbt_target_ms: Annotated[float, Option(
        "Target time between tokens. Prompt chunks shrink to keep other requests below it; 0 turns "
        "this off.",
        _STEPS, unit="ms", least=0)] = 50.0

    max_running_requests: Annotated[int, Option(
        "Most requests of one model that run at once on each device of the KV pool.",
        _REQUESTS, unit="requests", least=1, most=1 << 16, sglang="max_running_requests")] = 64
    max_queued_requests: Annotated[int, Option(
        "Most requests of one model that wait; further ones are refused with status 429.",
        _REQUESTS, unit="requests", least=0, most=1 << 31, sglang="max_queued_requests")] = 1024
    queue_timeout: Annotated[float, Option(
        "Time for which a request may wait for admission before it is refused with status 429.",
        _REQUESTS, unit="s", least=0)] = 600.0
    max_body_bytes: Annotated[int, Option(
        "Largest body of a request; larger ones are refused with status 413.",
        _REQUESTS, unit="bytes", least=1024)] = 8 << 20
    max_total_body_bytes: Annotated[int, Option(
        "Most bytes of the bodies of all requests that are read or answered now, where they are "
        "larger than 32 KiB; further ones are refused with status 503.",
        _REQUESTS, unit="bytes", least=1024)] = 256 << 20
    max_json_values: Annotated[int, Option(
        "Most values in the JSON of a request, beside as many as the longest context has tokens. "
        "A quarter may be strings, keys included, objects and lists.",
        _REQUESTS, least=1)] = 1 << 18
    max_json_depth: Annotated[int, Option(
        "Most objects and lists within each other in the JSON of a request.",
        _REQUESTS, least=1)] = 64
    max_list_entries: Annotated[int, Option(
        "Most entries of a list or an object in a request, such as messages, logit_bias or "
        "stop_token_ids; prompts and their token ids have bounds of their own.",
        _REQUESTS, least=1)] = 4096
    max_tools: Annotated[int, Option(
        "Most tools of a request; checking the schema of each takes milliseconds.",
        _REQUESTS, unit="tools", least=1)] = 512
    max_samples: Annotated[int, Option(
        "Most outputs of one request: its prompts times the samples of each.",
        _REQUESTS, least=1)] = 256
    max_stop_bytes: Annotated[int, Option(
        "Most bytes of all stop strings of a request together.",
        _REQUESTS, unit="bytes", least=1)] = 4096
    max_id_bytes: Annotated[int, Option(
        "Most bytes of an id or a key in a request: rid, cache_salt, extra_key, user and the like.",
        _REQUESTS, unit="bytes", least=1)] = 1024
    max_logprobs: Annotated[int, Option(
        "Most log-probabilities that one request may ask for, over all positions of its prompts "
        "and outputs.",
        _REQUESTS, least=1)] = 1 << 16
    grammar_timeout: Annotated[float, Option(
        "Processor time that a regex, JSON schema, EBNF or structural tag may take to be compiled. "
        "On the clock it may take twice as long, and longer where other processes have the "
        "processors. A longer one is refused with status 400; so is one that takes so long on the "
        "clock to follow a token.",
        _REQUESTS, unit="s", least=0.1)] = 0.75
    grammar_mask_timeout: Annotated[float, Option(
        "Processor time that a grammar may take to find which tokens may come next, beyond 10 ms "
        "for each token, before its request ends with status 400. The first may take a tenth.",
        _REQUESTS, unit="s", least=0.01)] = 0.5
    grammar_memory_bytes: Annotated[int, Option(
        "Memory that compiling one grammar may take.",
        _REQUESTS, unit="bytes")] = 1 << 30
    grammar_cache_bytes: Annotated[int, Option(
        "Memory for compiled grammars that are kept for later requests, over all models.",
        _REQUESTS, unit="bytes")] = 64 << 20
    random_seed: Annotated[int | None, Option(
        "Seed from which requests without a seed get theirs. If none is given, it is random.",
        _REQUESTS, least=-(1 << 63), most=(1 << 63) - 1, sglang="random_seed")] = None

    response_store_size: Annotated[int, Option(
        "Most responses of /v1/responses that enable_response_store keeps, of all models together; "
        "the least recently used ones are forgotten first.",
        _REQUESTS, unit="responses", least=1)] = 1000
    response_store_bytes: Annotated[int, Option(
        "Most memory of those responses and the conversations that lead to them.",
        _REQUESTS, unit="bytes", least=1)] = 256 << 20

    nnodes: Annotated[int, Option(
        "Number of hosts. On each runs a launcher; that of node 0 has the front end and the "
        "scheduler, the others the processes of their devices.",
        _HOSTS, unit="hosts", least=1, most=1024, sglang="nnodes")] = 1
    node_rank: Annotated[int, Option(
        "Number of this host, from 0 on.",
        _HOSTS, least=0, most=1023, sglang="node_rank")] = 0
    dist_init_addr: Annotated[str | None, Option(
        "Address of node 0, as HOST:PORT, at which it listens for the launchers of other hosts; "
        "their devices speak to the port after it. It is needed where there are several hosts.",
        _HOSTS, sglang="dist_init_addr")] = None
    dist_timeout: Annotated[float, Option(
        "Time that hosts have to find each other, at the start and when one was lost, before the "
        "server ends.",
        _HOSTS, unit="s", least=1, sglang="dist_timeout")] = 600.0
    host_timeout: Annotated[float, Option(
        "Time without a word from another host after which its devices count as lost until it is "
        "back.",
        _HOSTS, unit="s", least=1)] = 5.0
    keys: Annotated[str | None, Option(
        "File of `crosspool keys new`, the same on every host; it is needed where there are "
        "several.",
        _HOSTS)] = None

    host: Annotated[str, Option(
        "Address on which the server listens.",
        _SERVER, sglang="host")] = "127.0.0.1"
    port: Annotated[int, Option(
        "Port on which the server listens; 0 takes any free one.",
        _SERVER, least=0, most=65535, sglang="port")] = 30000
    router_url: Annotated[str | None, Option(
        "Router (`crosspool router`, or smg) at which the server registers its models, as "
        "http://HOST:PORT, and takes them back when they or the server go.",
        _SERVER)] = None
    advertise_url: Annotated[str | None, Option(
        "URL under which the router reaches this server. If none is given, it is made of host and "
        "port.",
        _SERVER)] = None
    router_api_key: Annotated[str | None, Option(
        "Key that the router asks for when its workers are changed.",
        _SERVER, is_secret=True)] = None
    max_connections: Annotated[int, Option(
        "Most connections that are open at once; further ones are refused with status 503.",
        _SERVER, least=1)] = 4096
    header_timeout: Annotated[float, Option(
        "Time that a client has to send the header of a request before its connection is closed.",
        _SERVER, unit="s", least=0.1)] = 10.0
    body_timeout: Annotated[float, Option(
        "Time that a client has to send the body of a request before its connection is closed.",
        _SERVER, unit="s", least=0.1)] = 60.0
    watchdog_timeout: Annotated[float, Option(
        "Time after which a device that owes the result of a step, a scheduler that does not "
        "answer, or a process that a signal has stopped counts as dead.",
        _SERVER, unit="s", least=1, sglang="watchdog_timeout")] = 300.0
    restart_limit: Annotated[int, Option(
        "How often a device process that has died is started again within a minute, and how many "
        "starts in a row may fail, before the server ends; 0: it ends with the first death.",
        _SERVER, least=0)] = 5
    hang_timeout: Annotated[float, Option(
        "Time without any progress, also within a step, after which a device process is killed and "
        "replaced.",
        _SERVER, unit="s", least=2)] = 4.0
    failure_grace: Annotated[float, Option(
        "Time for which the server answers 503 after a process that is not started again has died "
        "or counts as dead, before it ends.",
        _SERVER, unit="s", least=0)] = 5.0
    drain_timeout: Annotated[float, Option(
        "Time that requests in flight get to finish after SIGTERM, and those of a model that is "
        "unloaded.",
        _SERVER, unit="s", least=0)] = 60.0
    sglang: dict[str, Any] = {}
    """Arguments for SGLang that hold for every model, by ServerArgs field."""
# fmt: on


class Options(ServerOptions, frozen=True, kw_only=True):
    """A server as the user asks for it."""

    models: tuple[ModelOptions, ...]


MODEL_OPTIONS = options_of(ModelOptions, per_model=True)
SERVER_OPTIONS = options_of(ServerOptions, per_model=False)
