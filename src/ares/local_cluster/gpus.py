"""Which GPUs each instance of a local cluster gets: the visible GPUs and a request in, an assignment out."""

from dataclasses import dataclass

# Instances for decode where nothing else decides: two, so that requests can move.
_DECODE_WITHOUT_GPUS = 2


class GpuError(RuntimeError):
    """The GPUs do not suffice or cannot be used as asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that this process may use.

    Attributes
    ----------
    ids
        As the variable takes them: indices, UUIDs, or names of MIG devices.
    variables
        The variables with which an instance is given its own: ``CUDA_VISIBLE_DEVICES``, on AMD ``HIP_VISIBLE_DEVICES``
        or both.
    source
        What named them, for messages: a variable or a tool.
    """

    ids: tuple[str, ...] = ()
    variables: tuple[str, ...] = ("CUDA_VISIBLE_DEVICES",)
    source: str = "nvidia-smi"


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """What is asked for.

    Attributes
    ----------
    prefill
        Prefill instances.
    decode
        Decode instances; None: as many as there is room for.
    gpus_per_prefill, gpus_per_decode
        GPUs of one instance: its tensor-parallel size.
    share
        Whether several instances may run on one GPU.
    """

    prefill: int = 1
    decode: int | None = None
    gpus_per_prefill: int = 1
    gpus_per_decode: int = 1
    share: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which instance gets which GPUs.

    Attributes
    ----------
    decode
        Decode instances.
    prefill_gpus, decode_gpus
        The ids of each instance; empty where there are no GPUs.
    reasons
        Lines for the user: which instance gets which, and why.
    """

    decode: int
    prefill_gpus: tuple[tuple[str, ...], ...] = ()
    decode_gpus: tuple[tuple[str, ...], ...] = ()
    reasons: tuple[str, ...] = ()


def assign(gpus: Gpus, request: GpuRequest) -> Assignment:
    """Give each instance its GPUs, neighbours in the order of `gpus`, prefill first.

    There are three cases: no GPUs (nothing is assigned), enough for all (each instance has its own), and too few, where
    instances share only if that was asked for.

    Raises
    ------
    GpuError
        The GPUs do not suffice, or an instance cannot run on those that it would get.
    """
    if not gpus.ids:
        if request.share:
            raise GpuError("--share-gpus: no GPU was found on this machine")
        return Assignment(_DECODE_WITHOUT_GPUS if request.decode is None else request.decode)
    _check_parallel(gpus, request)
    left = len(gpus.ids) - request.prefill * request.gpus_per_prefill
    decode = request.decode
    if decode is None:
        decode = _DECODE_WITHOUT_GPUS if request.share else max(1, left // request.gpus_per_decode)
    sizes = [request.gpus_per_prefill] * request.prefill + [request.gpus_per_decode] * decode
    if sum(sizes) > len(gpus.ids) and not request.share:
        raise GpuError(_too_few(gpus, request, decode))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    shares = tuple(
        tuple(gpus.ids[(start + k) % len(gpus.ids)] for k in range(size))
        for start, size in zip(starts, sizes, strict=True)
    )
    return Assignment(
        decode, shares[: request.prefill], shares[request.prefill :], tuple(_reasons(gpus, request, decode, shares))
    )


def _check_parallel(gpus: Gpus, request: GpuRequest) -> None:
    sizes = {"decode": request.gpus_per_decode} | ({"prefill": request.gpus_per_prefill} if request.prefill else {})
    for role, size in sizes.items():
        if size > 1 and any(name.startswith("MIG-") for name in gpus.ids):
            raise GpuError(
                f"a {role} instance of {size} GPUs cannot run on MIG devices, of which CUDA gives a process only one: "
                "leave out --tensor-parallel-size, or use whole GPUs"
            )
        if size > len(gpus.ids):
            raise GpuError(
                f"a {role} instance needs {size} GPUs (tensor parallel), and {_seen(gpus)}: lower "
                "--tensor-parallel-size"
            )


def _seen(gpus: Gpus) -> str:
    count = len(gpus.ids)
    return f"{count} {'is' if count == 1 else 'are'} visible ({gpus.source}: {','.join(gpus.ids)})"


def _too_few(gpus: Gpus, request: GpuRequest, decode: int) -> str:
    parts = [(request.prefill, "prefill", request.gpus_per_prefill), (decode, "decode", request.gpus_per_decode)]
    needs = " + ".join(f"{count} {role} x {size}" for count, role, size in parts if count)
    needed = sum(count * size for count, _, size in parts)
    fewer = "start fewer instances (--prefill, --decode)"
    if request.prefill and request.gpus_per_decode <= len(gpus.ids):
        most = len(gpus.ids) // request.gpus_per_decode
        fewer = f"start fewer instances (for example --prefill 0 --decode {most}, where decode instances do both)"
    return (
        f"{needed} GPUs are needed ({needs}), and {_seen(gpus)}: {fewer}, or let instances share GPUs (--share-gpus "
        "with --gpu-memory-utilization)"
    )


def _reasons(gpus: Gpus, request: GpuRequest, decode: int, shares: tuple[tuple[str, ...], ...]) -> list[str]:
    lines = [f"GPUs: {_seen(gpus)}"]
    for n, share in enumerate(shares):
        name = f"prefill-{n}" if n < request.prefill else f"decode-{n - request.prefill}"
        with_others = any(set(share) & set(other) for k, other in enumerate(shares) if k != n)
        given = f"GPUs {','.join(share)} (tensor parallel)" if len(share) > 1 else f"GPU {share[0]}"
        lines.append(f"{name}: {given}{', shared with other instances' if with_others else ''}")
    if request.decode is None and not request.share:
        lines.append("decode instances are as many as fit on the GPUs that prefill leaves (--decode)")
        if decode == 1 and request.prefill:
            lines.append(
                "with one decode instance no request can move; --prefill 0 lets every instance prefill and decode"
            )
    used = {name for share in shares for name in share}
    if idle := [name for name in gpus.ids if name not in used]:
        lines.append(
            f"idle: {','.join(idle)}, which no instance was asked for: raise --decode, --prefill or "
            "--tensor-parallel-size"
        )
    return lines
