"""`comigs export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.bundle import Bundle
from edge_runtime.cli import LARGEST_SEED, Format, FormatOption, emit, messages, telling
from export import PRECISIONS
from export.places import places

ENGINE_CHOICES = {
    "onnxruntime": ("onnxruntime",),
    "executorch": ("executorch",),
    "both": ("onnxruntime", "executorch"),
}


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    out: Annotated[Path, typer.Option(help="Directory to write the bundle to.")],
    base: Annotated[
        str,
        typer.Option(help="gpt2-mini, smollm2-135m, a directory, GGUF file, or Hugging Face name."),
    ] = "gpt2-mini",
    weights: Annotated[
        str, typer.Option(help="pretrained, or random (for measuring speed only).")
    ] = "pretrained",
    precision: Annotated[
        str, typer.Option(help="Of the base's matrices: float32, int8 or int4.")
    ] = "float32",
    tier: Annotated[str, typer.Option(help="Device tier; see export/tiers.json.")] = "laptop",
    engine: Annotated[str, typer.Option(help="onnxruntime, executorch or both.")] = "both",
    mixing: Annotated[str, typer.Option(help="per_linear or per_block.")] = "per_linear",
    specialists: Annotated[int, typer.Option(help="Specialists beside the generalist.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of every LoRA pair.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha (scale alpha / sqrt(rank)).")] = 16.0,
    targets: Annotated[
        str,
        typer.Option(
            help="Linear maps that carry LoRA, comma-separated (default: all of a block)."
        ),
    ] = "",
    generalist: Annotated[
        Path | None, typer.Option(help="Adapter trained with PEFT that the generalist starts as.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the fresh adapters.", min=0, max=LARGEST_SEED)
    ] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Compile a base and its experts into a bundle for a device tier."""
    # Imported here: neither `comigs --help` nor a wrong option must wait for torch.
    from export.mixture import Mixture
    from export.tiers import tiers

    known = tiers()
    if tier not in known:
        raise typer.BadParameter(f"choose from {', '.join(known)}", param_hint="--tier")
    if engine not in ENGINE_CHOICES:
        raise typer.BadParameter(f"choose from {', '.join(ENGINE_CHOICES)}", param_hint="--engine")
    check_weights(weights)
    check_precision(precision)
    try:
        mixture = Mixture(
            mixing=mixing,
            specialists=specialists,
            rank=rank,
            alpha=alpha,
            targets=tuple(t.strip() for t in targets.split(",") if t.strip()),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    places(out, overwrite=overwrite)  # what follows takes seconds
    from export.base import load_base
    from export.bundle import export_bundle

    with telling("loading the base") as tell:
        loaded = load_base(base, random_weights=weights == "random")
        try:
            mixture = mixture.on(loaded.architecture)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--targets") from error
        bundle = export_bundle(
            loaded,
            mixture,
            known[tier],
            engines=ENGINE_CHOICES[engine],
            out=out,
            precision=precision,
            seed=seed,
            generalist=generalist,
            overwrite=overwrite,
            progress=tell,
        )
    if output is Format.JSON:
        emit(summary(bundle))
    else:
        messages.print(f"wrote {out}")
        messages.print(_table(bundle))


def check_weights(weights: str) -> None:
    if weights not in ("pretrained", "random"):
        raise typer.BadParameter("choose pretrained or random", param_hint="--weights")


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"choose {' or '.join(PRECISIONS)}", param_hint="--precision")


def summary(bundle: Bundle) -> dict[str, Any]:
    """What an export reports: parity and memory per program, disk per engine."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "base": manifest.base.name,
        "precision": manifest.base.precision,
        "mixing": manifest.mixture.mixing,
        "specialists": manifest.mixture.specialists,
        "programs": [
            {
                "name": p.name,
                "engine": p.engine,
                "worst_relative_error": p.parity.worst_relative_error,
                "worst_output": p.parity.worst_output,
                "tolerance": p.parity.tolerance,
                "memory_mib": round(p.memory_bytes / 2**20, 1),
            }
            for p in manifest.programs
        ],
        "engines": [
            {
                "engine": cost.engine,
                "base_mib": round(cost.base_bytes / 2**20, 1),
                "disk_mib": round(cost.disk_bytes / 2**20, 1),
                "runtime_mib": round(cost.runtime_bytes / 2**20, 1),
            }
            for cost in manifest.engines
        ],
    }


def _table(bundle: Bundle) -> Any:
    from rich.table import Table

    table = Table("program", "engine", "worst error against PyTorch", "memory")
    for p in summary(bundle)["programs"]:
        error = f"{p['worst_relative_error']:.1e} ({p['worst_output']})"
        table.add_row(p["name"], p["engine"], error, f"{p['memory_mib']:.0f} MiB")
    return table
