# SPDX-License-Identifier: Apache-2.0
"""`keelwright repair METHOD|RECIPE`: one edit, written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from keelwright.cli.options import Device, Json, Offline, Quiet, Run, Seed, Suite, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json, stdout_console
from keelwright.core.errors import ConfigError

_RECIPES = (".yaml", ".yml", ".json")


def repair(
    method: Annotated[str, typer.Argument(help="A method (see `keelwright methods`), or a recipe file (.yaml).")],
    out: Annotated[Path | None, typer.Option(help="Where the repaired model goes.")] = None,
    tuned: Annotated[
        list[str] | None, typer.Option(help="The tuned model; repeat it for methods that take several.")
    ] = None,
    aligned: Annotated[str | None, typer.Option(help="Where safety was good.")] = None,
    unaligned: Annotated[str | None, typer.Option(help="A model whose refusals were tuned away, for resta.")] = None,
    base: Annotated[str | None, typer.Option(help="The model from before alignment, for safe_lora and lox.")] = None,
    reference: Annotated[str | None, typer.Option(help="The common ancestor of both sides, for vl.")] = None,
    coefficient: Annotated[
        str | None,
        typer.Option(
            help="A number (0 aligned to 1 tuned; resta: strength); several with commas, one output each, from one "
            "reading; or auto to search as heal does."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the method, for example density=0.2."),
    ] = None,
    preferences: Annotated[
        Path | None, typer.Option(help="JSON lines of prompt, safe and unsafe answer, for somf.")
    ] = None,
    safety_rows: Annotated[
        Path | None, typer.Option(help="JSON lines of harmful prompts with refusals, for safe_delta.")
    ] = None,
    examples: Annotated[Path | None, typer.Option(help="JSON lines of prompts with answers, for lm_cocktail.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the plan per group of tensors; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the models look unrelated.")] = False,
    allow_template_change: Annotated[
        bool, typer.Option("--allow-template-change", help="Go on although the chat templates differ.")
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(help="Largest output file, GB.")] = 5.0,
    out_dtype: Annotated[str | None, typer.Option(help="BF16, F16, F32 or F64; default: the tuned model's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at work; default: one per core.", min=1)] = None,
    executor: Annotated[str, typer.Option(help="processes, or ray for tasks on a Ray cluster.")] = "processes",
    utility: Utility = None,
    no_utility: Annotated[bool, typer.Option("--no-utility", help="With auto: choose by safety alone.")] = False,
    suite: Suite = "auto",
    run: Run = None,
    seed: Seed = 0,
    device: Device = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Apply one repair with given settings, or a recipe, and write the model. Safety is not evaluated."""
    with errors_as_exit_codes(as_json=as_json):
        _require_models(method, tuned, aligned, out, coefficient=coefficient, explain=explain)
    if coefficient == "auto" and tuned and aligned and out:
        from keelwright.cli.heal import heal

        heal(
            aligned, tuned[0], out, methods=method, utility=utility, no_utility=no_utility, unaligned=unaligned,
            suite=suite, max_shard_gb=max_shard_gb, allow_template_change=allow_template_change, run=run, seed=seed,
            device=device, offline=offline, quiet=quiet, as_json=as_json,
        )  # fmt: skip
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        _require_no_search_options(utility, no_utility, suite, run)
        from keelwright.weights.write import effort_of

        effort = effort_of(workers, executor)
        given_rows = {"preferences": preferences, "safety_rows": safety_rows, "examples": examples}
        if method.endswith(_RECIPES):
            _require_no_models(
                {
                    "--tuned": tuned,
                    "--aligned": aligned,
                    "--unaligned": unaligned,
                    "--base": base,
                    "--reference": reference,
                    "--coefficient": coefficient,
                    "--set": set_,
                    **{f"--{name.replace('_', '-')}": path for name, path in given_rows.items()},
                }
            )
            from keelwright.repair.recipe import repair_recipe

            result = repair_recipe(
                method,
                out=out,
                offline=offline,
                max_shard_bytes=int(max_shard_gb * 1e9),
                out_dtype=out_dtype,
                explain=explain,
                effort=effort,
                progress=progress,
            )
        else:
            from keelwright.repair.materialise import repair as run_repair

            result = run_repair(
                method,
                aligned=aligned,
                tuned=tuned or [],
                unaligned=unaligned,
                base=base,
                reference=reference,
                coefficient=_numbers(coefficient),
                settings=_settings(set_ or []),
                rows={name: path for name, path in given_rows.items() if path is not None},
                device=device,
                seed=seed,
                out=out,
                offline=offline,
                max_shard_bytes=int(max_shard_gb * 1e9),
                force=force,
                out_dtype=out_dtype,
                allow_template_change=allow_template_change,
                explain=explain,
                effort=effort,
                progress=progress,
            )
    if as_json:
        print_json(result)
        return
    console = stdout_console()
    if "plan" in result:
        width = max(len(name) for name, _ in result["plan"])
        for name, text in result["plan"]:
            console.print(f"{name:<{width}}  {text}", markup=False, soft_wrap=True)
        return
    for row in result.get("outputs", [result]):
        named = ", ".join(f"{name} {value:g}" for name, value in row.get("coefficients", {}).items())
        words = f"{row['out']}: {result['method']}{' with ' + named if named else ''}, safety not evaluated."
        console.print(words, markup=False, soft_wrap=True)
    if aligned:
        example = result.get("outputs", [result])[0]["out"]
        console.print(f"next: keelwright audit {example} --against {aligned}", markup=False, soft_wrap=True)


def _require_models(
    method: str,
    tuned: Sequence[str] | None,
    aligned: str | None,
    out: Path | None,
    *,
    coefficient: str | None,
    explain: bool,
) -> None:
    """Raise for what every repair needs; a recipe names its models itself."""
    is_recipe = method.endswith(_RECIPES)
    if not is_recipe and not tuned:
        raise ConfigError(
            f"The method '{method}' needs a tuned model.",
            expected="--tuned MODEL",
            found="nothing",
            fix="pass the model to repair; or a recipe file, which names its models itself",
        )
    if out is None and not explain:
        raise ConfigError("There is no place for the output.", expected="--out DIR", found="nothing", fix="add --out")
    if coefficient == "auto" and (is_recipe or aligned is None or len(tuned or ()) != 1 or out is None):
        raise ConfigError(
            "A search needs one aligned and one tuned model.",
            expected="a method with --aligned, one --tuned and --out",
            found=f"{'a recipe' if is_recipe else method} with {len(tuned or ())} tuned models",
            fix="give a number for --coefficient, or use keelwright heal",
        )


def _require_no_models(given: Mapping[str, object]) -> None:
    """Refuse what a recipe says itself."""
    found = [name for name, value in given.items() if value]
    if found:
        raise ConfigError(
            f"'{found[0]}' has no meaning with a recipe.",
            expected="a recipe, which names its models and settings itself",
            found=", ".join(found),
            fix=f"drop {found[0]}, or change the recipe",
        )


def _require_no_search_options(utility: str | None, no_utility: bool, suite: str, run: Path | None) -> None:
    """Refuse what only a search with `--coefficient auto` would use: it must not look as if it had been heeded."""
    given = {"--utility": utility, "--no-utility": no_utility, "--suite": suite != "auto", "--run": run}
    idle = [name for name, value in given.items() if value]
    if idle:
        raise ConfigError(
            f"'{idle[0]}' has no meaning with a given coefficient: nothing is measured.",
            expected="--coefficient auto with it, or neither",
            found=", ".join(idle),
            fix=f"drop {idle[0]}, or write --coefficient auto",
        )


def _numbers(text: str | None) -> float | list[float] | None:
    """Return the coefficient, or the several of a sweep."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            "'--coefficient' is not a number.",
            expected="a number, several with commas, or auto",
            found=text,
            fix="write for example 0.5",
        ) from None
    return values[0] if len(values) == 1 else values


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `--set`: names to plain values, written as in a recipe."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name or name in found:
            raise ConfigError(
                "'--set' is not understood.",
                expected="NAME=VALUE, each name once",
                found=pair,
                fix="write for example --set density=0.2",
            )
        try:
            found[name.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"The value of '{name}' is not understood.",
                expected="a number, true, false, a word, or a list such as [0.5, 0.5]",
                found=text,
                fix=str(error).splitlines()[0],
            ) from error
    return found
