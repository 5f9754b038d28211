"""Which server answers at an address, and how many tokens it drafts in a round."""

import httpx

from common.errors import UserError
from common.servers import api_key, described
from eval.serving.counters import DRAFTS, vllm_counts
from eval.serving.servers import Server, Sglang, Vllm


def find_server(url: str, names: list[str], drafts: bool = True) -> Server:
    """The server that answers at `url`. `names`: what its model may be called; `drafts`: whether it has to draft (False: it may).

    Raises:
        UserError: no server answers, it serves another model, does not draft, or does not tell of it.
    """
    # People give either: clients of OpenAI's want /v1, and metrics lie beside it.
    url = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, headers=api_key(), timeout=30) as client:
            return _found(client, url, names, drafts)
    except httpx.HTTPStatusError as error:
        raise UserError(f"server.url={url}: {error.request.url.path} answers {error.response.status_code}") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise UserError(f"server.url={url}: no server answers there ({described(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"server.url={url} does not answer as vLLM or SGLang would ({described(error)})") from error


def _found(client: httpx.Client, url: str, names: list[str], drafts: bool) -> Server:
    served = client.get("/v1/models").raise_for_status().json()["data"]
    # `id` is the name under which it is served, `root` the path that it was loaded from.
    known = {one[name]: one for one in served for name in ("root", "id") if one.get(name)}
    model = next((known[name] for name in names if name in known), None)
    if model is None:
        raise UserError(
            f"server.url={url} serves {', '.join(one['id'] for one in served) or 'nothing'}, and the target is {names[0]} "
            "(server.model=NAME, if it goes by another name there)"
        )
    said = (url, model["id"], model.get("max_model_len"))
    told = client.get("/metrics")
    if not told.is_error and "vllm:" in told.text:
        slots = _vllm_slots(url, told.text) if drafts else 0
        version = client.get("/version")
        return Vllm(*said, slots, "" if version.is_error else str(version.json().get("version", "")))
    # The newer name and the older one.
    for path in ("/server_info", "/get_server_info"):
        answer = client.get(path)
        info = {} if answer.is_error else answer.json()
        if "speculative_algorithm" in info:
            server = Sglang(*said, _sglang_slots(url, info), str(info.get("version", "")))
            server.samples_drafts = str(info["speculative_algorithm"]).upper() == "DSPARK"
            return server
    raise UserError(
        f"server.url={url} tells nothing of its drafts: neither /metrics with vLLM's counters (start vLLM without "
        "--disable-log-stats) nor SGLang's /server_info"
    )


def _vllm_slots(url: str, metrics: str) -> int:
    """Raises UserError when it does not draft."""
    count_C = vllm_counts(metrics)
    if count_C is None:
        raise UserError(f"server.url={url} does not draft: /metrics has no {DRAFTS} (start vLLM with --speculative-config)")
    return len(count_C) - 1


def _sglang_slots(url: str, info: dict) -> int:
    """Raises UserError when it does not draft."""
    if not info["speculative_algorithm"]:
        raise UserError(f"server.url={url} does not draft (start SGLang with --speculative-algorithm)")
    if (info.get("speculative_eagle_topk") or 1) > 1:
        return info["speculative_num_steps"]  # the depth of its trees
    return info["speculative_num_draft_tokens"] - 1  # the anchor's row is counted there
