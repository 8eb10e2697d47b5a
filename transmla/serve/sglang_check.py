"""Compare a model in SGLang's scheduler with its export's signature before it serves. Only SGLang imports this file.

The seeded tokens run through SGLang's attention and cache once one by one, as in decoding, and once together, as in
prefill. SGLang's own benchmark of one batch makes the steps.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

import torch
from sglang.benchmark.one_batch import decode, extend
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from torch import Tensor

from transmla.serve.family_config import OPTION
from transmla.serve.self_check import compare_served, refusal, signed_logits
from transmla.signature.probe import TOKENS, tokens

logger = logging.getLogger(__name__)
UNCHECKED = f"--json-model-override-args '{{\"{OPTION}\": false}}'"


def check(scheduler: Any, server_args: Any) -> None:
    """Compare the loaded model, an export, with its signature.

    Raises:
        ValueError: if the model's logits differ from the signed ones.
    """
    runner = scheduler.tp_worker.model_runner
    config = runner.model_config.hf_config.to_dict()
    signed = signed_logits(config)
    reason = None
    if not config.get(OPTION, True):
        reason = f"as {OPTION} asks"
    elif signed is None:
        reason = "because the export has no signature"
    elif min(runner.model_config.context_len, runner.max_total_num_tokens) <= TOKENS:
        reason = f"which takes {TOKENS + 1} tokens"
    elif server_args.pp_size > 1 or server_args.speculative_algorithm or server_args.disaggregation_mode != "null":
        reason = "which takes a server without pipeline stages, speculation and disaggregation"
    if reason is not None or signed is None:
        logger.warning("transmla: the logits were not checked, %s", reason)
        return
    ids: list[int] = tokens(runner.model_config.vocab_size)[0].tolist()
    decoded, prefilled = one_by_one(ids, runner), together(ids, runner)
    found = compare_served(decoded, prefilled, signed, runner.dtype)
    if not found.passed:
        raise ValueError(refusal(found, "SGLang", UNCHECKED))
    logger.info("transmla: the logits are those signed: %s", found.detail)


def one_by_one(ids: list[int], runner: Any) -> Tensor:
    """Return the logits [T, vocabulary] of the tokens ``ids``, read one by one."""
    _, first, batch = extend([_request(ids[:1])], runner)
    # All steps of decoding write their logits to one buffer, so they are copied at once.
    logits = [first.float().cpu()]
    for token in ids[1:]:
        made = decode(torch.tensor([token], device=runner.device), batch, runner)[1]
        logits.append(made.float().cpu())
    _empty(runner)
    return torch.cat(logits)


def together(ids: list[int], runner: Any) -> Tensor:
    """Return the logits [vocabulary] of the last of the tokens ``ids``, read at once."""
    logits = extend([_request(ids)], runner)[1][-1].float().cpu()
    _empty(runner)
    return logits


def _request(ids: list[int]) -> Req:
    """Return a request whose prompt is ``ids``."""
    sampling = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
    request = Req(rid=OPTION, origin_input_text="", origin_input_ids=array("q", ids), sampling_params=sampling)
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.set_extend_range(0, len(ids))
    return request


def _empty(runner: Any) -> None:
    """Free the cache, in which nothing but the tokens of the check is stored before the server is ready."""
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
