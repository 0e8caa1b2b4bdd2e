"""Replies to what SGLang's tokenizer manager asks of a scheduler besides generating.

The caller waits without a time limit, so every request gets a reply. What CrossPool does not do is
refused with a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers import io_struct as io

UNSUPPORTED = "CrossPool does not support this"
NO_CACHE = "there is no prefix cache to flush: it is switched off"
FLUSHED = "all cached prefixes were dropped, except those that running requests use"
NO_PROFILE = "CrossPool has no torch profiler; POST /crosspool/trace/start records lane events"

Maker = Callable[[Any], Any]


def _refused(output: Any) -> Maker:
    return lambda request: output(success=False, message=UNSUPPORTED)


def _lora(request: Any) -> Any:
    return io.LoRAUpdateOutput(success=False, error_message="LoRA adapters are not supported")


REPLIES: dict[type, Maker] = {
    io.SetInternalStateReq: lambda r: io.SetInternalStateReqOutput(updated=False),
    io.ProfileReq: lambda r: io.ProfileReqOutput(success=False, message=NO_PROFILE),
    io.OpenSessionReqInput: lambda r: io.OpenSessionReqOutput(
        session_id=r.session_id, success=False
    ),
    io.UpdateWeightFromDiskReqInput: _refused(io.UpdateWeightFromDiskReqOutput),
    io.UpdateWeightsFromDistributedReqInput: _refused(io.UpdateWeightsFromDistributedReqOutput),
    io.UpdateWeightsFromTensorReqInput: _refused(io.UpdateWeightsFromTensorReqOutput),
    io.UpdateWeightsFromIPCReqInput: _refused(io.UpdateWeightsFromIPCReqOutput),
    io.InitWeightsUpdateGroupReqInput: _refused(io.InitWeightsUpdateGroupReqOutput),
    io.DestroyWeightsUpdateGroupReqInput: _refused(io.DestroyWeightsUpdateGroupReqOutput),
    io.InitWeightsSendGroupForRemoteInstanceReqInput: _refused(
        io.InitWeightsSendGroupForRemoteInstanceReqOutput
    ),
    io.SendWeightsToRemoteInstanceReqInput: _refused(io.SendWeightsToRemoteInstanceReqOutput),
    io.BeginWeightUpdateReqInput: _refused(io.BeginWeightUpdateReqOutput),
    io.EndWeightUpdateReqInput: _refused(io.EndWeightUpdateReqOutput),
    io.UpdateWeightVersionReqInput: lambda r: io.UpdateWeightVersionReqOutput(),
    io.GetWeightsByNameReqInput: lambda r: io.GetWeightsByNameReqOutput(parameter=None),
    io.CheckWeightsReqInput: _refused(io.CheckWeightsReqOutput),
    io.ReleaseMemoryOccupationReqInput: lambda r: io.ReleaseMemoryOccupationReqOutput(),
    io.ResumeMemoryOccupationReqInput: lambda r: io.ResumeMemoryOccupationReqOutput(),
    io.SlowDownReqInput: lambda r: io.SlowDownReqOutput(),
    io.PdRoleSwitchReqInput: _refused(io.PdRoleSwitchReqOutput),
    io.ScaleElasticEPReqInput: _refused(io.ScaleElasticEPReqOutput),
    io.ClearHiCacheReqInput: lambda r: io.ClearHiCacheReqOutput(success=False),
    io.AttachHiCacheStorageReqInput: _refused(io.AttachHiCacheStorageReqOutput),
    io.DetachHiCacheStorageReqInput: _refused(io.DetachHiCacheStorageReqOutput),
    io.AddExternalCorpusReqInput: _refused(io.AddExternalCorpusReqOutput),
    io.RemoveExternalCorpusReqInput: _refused(io.RemoveExternalCorpusReqOutput),
    io.ListExternalCorporaReqInput: _refused(io.ListExternalCorporaReqOutput),
    io.ExpertDistributionReq: lambda r: io.ExpertDistributionReqOutput(),
    io.LoadLoRAAdapterReqInput: _lora,
    io.LoadLoRAAdapterFromTensorsReqInput: _lora,
    io.UnloadLoRAAdapterReqInput: _lora,
    io.DumperControlReqInput: lambda r: io.DumperControlReqOutput(
        success=False, response=[], error=UNSUPPORTED
    ),
    io.LazyDumpTensorsReqInput: lambda r: io.LazyDumpTensorsReqOutput(success=False),
}
"""Functions that make the reply to a request from the request alone, by its type."""

ANSWERED: tuple[type, ...] = (*REPLIES, io.GetInternalStateReq, io.FlushCacheReqInput)
"""Requests to which the scheduler itself replies, each in its turn."""

FORWARDED: tuple[type, ...] = (io.FreezeGCReq, io.ConfigureLoggingReq)
"""Requests for the detokenizer, which a tokenizer manager can reach only through the scheduler."""

WITHOUT_REPLY: tuple[type, ...] = (
    io.CloseSessionReqInput,
    io.BlockReqInput,
    io.EncoderDispatchErrorReq,
)
"""Requests for which nobody waits and nothing is done: sessions and encoders do not exist."""
