"""ServerArgs and PortArgs of a deployment's models, which is how SGLang sees them.

Import :mod:`crosspool.frontend.compat` and call ``install()`` before this module.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sglang.srt.server_args import PortArgs, ServerArgs

from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.sglang_flags import BY_NAME, reason_refused, without_secrets
from crosspool.frontend.model_folder import model_folder
from crosspool.models.registry import has_recurrent_state
from crosspool.observability.request_spans import service_name

_NOT_QUANTIZED = '{"quantization_config": null, "compression_config": null}'
"""How the checkpoint is quantised concerns ranks alone. SGLang would refuse what it has no kernels
for on this machine, such as GPTQ."""


def server_args(deployment: Deployment, number: int) -> ServerArgs:
    """ServerArgs of model ``number``, resolved and checked by SGLang.

    They hold no secrets: whoever needs one takes it from the deployment. Raises ConfigError for an
    argument that CrossPool does not take or that SGLang finds wrong."""
    model = deployment.models[number]
    arguments = without_secrets({**deployment.sglang, **model.sglang})
    for name in arguments:
        flag = BY_NAME.get(name)
        if flag is None or flag.effect != "sglang":
            raise ConfigError(f"{model.name}: {name}: {reason_refused(name)}")
    if arguments.get("enable_trace"):
        arguments["otlp_service_name"] = service_name(arguments)
    arguments.update(
        model_path=str(model_folder(deployment, number)),
        served_model_name=model.name,
        context_length=model.context_length,
        dtype=model.dtype,
        kv_cache_dtype=model.kv_cache_dtype,
        json_model_override_args=_NOT_QUANTIZED,
        device="cpu",
        host=deployment.host,
        port=deployment.port,
        page_size=deployment.page_size,
        chunked_prefill_size=deployment.chunked_prefill_size,
        max_running_requests=deployment.max_running_requests,
        max_queued_requests=deployment.max_queued_requests,
        watchdog_timeout=deployment.watchdog_timeout,
        random_seed=deployment.random_seed,
        skip_server_warmup=True,
        enable_multimodal=False,  # of multimodal models the language model alone is served
        # SGLang's prefix cache of recurrent states needs a GPU; here there is none (kvpool.layout).
        disable_radix_cache=not deployment.prefix_cache or has_recurrent_state(Path(model.path)),
    )
    try:
        args = ServerArgs(**arguments)
        args.resolve_once()
        args.check_server_args()
    except (ValueError, TypeError, AssertionError, OSError) as error:
        raise ConfigError(f"{model.name}: {error}") from error
    return args


def port_args(deployment: Deployment, number: int, detokenizer: int = 1) -> PortArgs:
    """The sockets of model ``number``: files in the runtime folder, by names that every process
    can work out. Each detokenizer, of which this is the number, binds a socket of its own name, so
    that it gets nothing that was meant for the one before it."""

    def socket(name: str) -> str:
        return f"ipc://{deployment.runtime_dir}/m{number}.{name}"

    return PortArgs(
        tokenizer_ipc_name=socket("tokenizer"),
        scheduler_input_ipc_name=socket("scheduler"),
        detokenizer_ipc_name=socket("detokenizer" if detokenizer == 1 else f"detok.{detokenizer}"),
        rpc_ipc_name=socket("rpc"),
        metrics_ipc_name=socket("metrics"),
        nccl_port=0,
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
        instance_id=f"crosspool-{number}",
    )


def remove_left_sockets(deployment: Deployment, served: Collection[int], *names: str) -> None:
    """Removes the files of sockets whose names begin with one of ``names``, of all models but those
    that are ``served``: a process in whose place another one is has left them."""
    for file in Path(deployment.runtime_dir).glob("m*.*"):
        model, _, name = file.name.partition(".")
        if name.startswith(names) and int(model[1:]) not in served:
            file.unlink(missing_ok=True)
