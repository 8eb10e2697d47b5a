"""vLLM's worker, which compares a loaded export with its signature before it serves. Only vLLM imports this file.

An export's config records projections of the model's logits for seeded tokens (``transmla.signature``). The worker runs
the same tokens through vLLM's attention and cache, after all else is ready: once one by one, as in decoding, and once
together, as in prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from transmla.serve.family_config import OPTION
from transmla.serve.self_check import SignedLogits, compare_served, refusal, signed_logits
from transmla.signature.probe import TOKENS, tokens

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(f"vllm.{__name__}")
UNCHECKED = f"--additional-config '{{\"{OPTION}\": false}}'"
DECODED, PREFILLED = "transmla_self_check_decode", "transmla_self_check_prefill"


class CheckedWorker(Worker):
    """Worker that refuses to serve a model whose logits differ from those signed."""

    def compile_or_warm_up_model(self) -> Any:
        """Complete the start of the worker, then check the model.

        Raises:
            ValueError: if the model's logits differ from the signed ones.
        """
        times = super().compile_or_warm_up_model()
        signed = signed_logits(self.model_config.hf_config.to_dict())
        if not (self.vllm_config.additional_config or {}).get(OPTION, True):
            logger.warning("transmla: the logits were not checked, as %s asks", OPTION)
        elif signed is None:
            logger.warning("transmla: the export has no signature, so its logits were not checked")
        elif self.model_config.max_model_len <= TOKENS:
            logger.warning("transmla: the logits were not checked, which takes %d tokens", TOKENS + 1)
        else:
            self._check(signed)
        return times

    @torch.inference_mode()
    def _check(self, signed: SignedLogits) -> None:
        model = self.model_runner.get_model()
        ids: list[int] = tokens(self.model_config.hf_config.vocab_size)[0].tolist()
        runs: list[list[Tensor]] = []
        for steps in (one_by_one(ids, self._blocks()), together(ids, self._blocks())):
            with recorded(model) as logits:
                for step in steps:
                    if self.execute_model(step) is None and step.total_num_scheduled_tokens:
                        self.sample_tokens(None)
            runs.append(logits)
        if not runs[0]:
            # The logits are on the first device of the last stage, unless sampling is split among devices.
            if get_pp_group().is_last_rank and get_tensor_model_parallel_rank() == 0:
                logger.warning("transmla: the logits were not checked, because devices share the sampling")
            return
        found = compare_served(torch.cat(runs[0]), runs[1][-1][-1], signed, self.model_config.dtype)
        if not found.passed:
            raise ValueError(refusal(found, "vLLM", UNCHECKED))
        logger.info("transmla: the logits are those signed: %s", found.detail)

    def _blocks(self) -> tuple[list[int], ...]:
        """Return blocks of the cache for the tokens of the check. Block 0 belongs to vLLM."""
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        sizes = [group.kv_cache_spec.block_size for group in groups]
        return tuple(list(range(1, 1 + -(-(TOKENS + 1) // size))) for size in sizes)


@contextmanager
def recorded(model: Any) -> Iterator[list[Tensor]]:
    """Yield a list to which ``model`` adds the logits [n, vocabulary] that it computes in this context."""
    logits: list[Tensor] = []
    compute = model.compute_logits

    def compute_and_record(*args: Any, **kwargs: Any) -> Tensor | None:
        found: Tensor | None = compute(*args, **kwargs)
        if found is not None:
            logits.append(found.detach().float().cpu())
        return found

    model.compute_logits = compute_and_record
    try:
        yield logits
    finally:
        del model.compute_logits


def one_by_one(ids: list[int], blocks: tuple[list[int], ...]) -> Iterator[SchedulerOutput]:
    """Yield vLLM's steps in which one request reads its prompt ``ids`` token by token, and then ends."""
    yield _first(DECODED, ids, blocks, 1)
    for computed in range(1, len(ids)):
        step = SchedulerOutput.make_empty()
        step.scheduled_cached_reqs = CachedRequestData(
            req_ids=[DECODED],
            resumed_req_ids=set(),
            new_token_ids=[[]],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[computed],
            num_output_tokens=[0],
        )
        yield _scheduled(step, DECODED, 1)
    yield _last(DECODED)


def together(ids: list[int], blocks: tuple[list[int], ...]) -> Iterator[SchedulerOutput]:
    """Yield vLLM's steps in which one request reads its prompt ``ids`` at once, and then ends."""
    yield _first(PREFILLED, ids, blocks, len(ids))
    yield _last(PREFILLED)


def _first(name: str, ids: list[int], blocks: tuple[list[int], ...], count: int) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=name,
            prompt_token_ids=ids,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            block_ids=blocks,
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=ids,
        )
    ]
    return _scheduled(step, name, count)


def _scheduled(step: SchedulerOutput, name: str, count: int) -> SchedulerOutput:
    step.num_scheduled_tokens, step.total_num_scheduled_tokens = {name: count}, count
    step.num_common_prefix_blocks = [0]
    return step


def _last(name: str) -> SchedulerOutput:
    step = SchedulerOutput.make_empty()
    step.finished_req_ids = {name}
    return step
