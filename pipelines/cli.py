"""The command line: `darkroom COMMAND`. Exit codes: 0 done, 2 a user's mistake, 1 the rest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from model_core.documents import UserError
from model_core.storage.errors import StorageError
from pipelines.documents import DEFAULT_SITE, find_recipe, find_site
from pipelines.errors import RunError, Stopped

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trains a model that draws from text and edits by instruction, from raw images to a registered model.",
)
out = Console(soft_wrap=True, highlight=False)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="smoke, demo, finetune, qwen_image_2, or the path of a recipe's YAML.")]
SiteName = Annotated[str, typer.Option("--site", metavar="SITE", help="local, or the path of a site's YAML.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Sets one field of the recipe; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Prints JSON, for a script.")]


def main() -> None:
    """Runs the command line: the one place where errors become sentences and exit codes."""
    try:
        app(prog_name="darkroom")
    except UserError as error:
        _fail(str(error), 2)
    except (RunError, StorageError) as error:
        _fail(str(error), 1)
    except (Stopped, KeyboardInterrupt):
        _fail("stopped; the same command goes on from there", 1)


@app.command(epilog="Example: darkroom run demo --set mmdit.stages.S6.lr=1e-5")
def run(
    recipe: RecipeName,
    site: SiteName = DEFAULT_SITE,
    assignments: Assignments = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; RECIPE-TIME when not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Shows what would run and what would be reused, and stops.")] = False,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe on this machine: every step that is not done yet, to the report."""
    what, where = find_recipe(recipe, assignments or ()), find_site(site)
    from pipelines.run import check_inputs, run_training

    if dry_run:
        from pipelines.plan import plan_run
        from pipelines.show import plan_table

        check_inputs(what, where)
        steps = plan_run(what, where)
        _show([entry.to_json() for entry in steps] if as_json else plan_table(steps))
        return
    from pipelines.show import card

    lines = Console(file=sys.stderr if as_json else sys.stdout, soft_wrap=True, highlight=False)  # named now: the run redirects sys.stdout
    finished = run_training(what, where, name=name, say=lambda line: lines.print(line, markup=False))
    _show(card(finished, where, as_json=as_json, site_name=site))


@app.command(epilog="Example: darkroom plan qwen_image_2 --gpus 1024 --gpu h200 --mfu 0.4")
def plan(
    recipe: RecipeName,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs that train together.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="a100, h100, h200, b200 or gb200: its peak and its memory.")] = "h200",
    peak_tflops: Annotated[
        float | None, typer.Option("--peak-tflops", metavar="X", help="Dense bf16 TFLOP/s of one GPU, in place of its data sheet's.")
    ] = None,
    mfu: Annotated[float, typer.Option("--mfu", metavar="SHARE", help="Share of the peak that training reaches, 0 to 1.")] = 0.4,
    caption_tokens: Annotated[int, typer.Option("--caption-tokens", metavar="N", help="Tokens of every prompt.")] = 256,
    shards: Annotated[
        int | None, typer.Option("--shards", metavar="N", help="GPUs that share one copy of the state (HSDP); all of them when not given.")
    ] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Tells what a recipe would cost: parameters, memory of a GPU, FLOPs, GPU hours, bytes. What a run would do: run --dry-run."""
    what = find_recipe(recipe, assignments or ())
    from pipelines.cost import assumed_hardware, estimate_cost
    from pipelines.cost_tables import cost_tables

    hardware = assumed_hardware(gpus=gpus, gpu=gpu, mfu=mfu, peak_tflops=peak_tflops, shards=shards)
    cost = estimate_cost(what, hardware, caption_tokens=caption_tokens)
    _show(cost.to_json() if as_json else cost_tables(cost))


@app.command(epilog="Example: darkroom compile demo -o pipeline.yaml")
def compile(
    recipe: RecipeName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The YAML file to write.")] = Path("pipeline.yaml"),
    site: SiteName = DEFAULT_SITE,
    assignments: Assignments = None,
) -> None:
    """Writes the DAG for Kubeflow Pipelines; it depends on the recipe's stages and optional sections, and the site's image alone."""
    found, image = find_recipe(recipe, assignments or ()), find_site(site).image
    from pipelines.compile import compile_training
    from pipelines.training import Sections

    try:
        compile_training(found.stages, Sections.of(found), image=image, output=output)
    except OSError as error:
        raise UserError(f"compile: --output {output}: cannot be written ({error.strerror})") from error
    typer.echo(f"wrote {output}")


@app.command(
    epilog='Example: darkroom sample demo-20261121-093000 "a red circle on the left with the text A7" --seed 1 --student --enhance'
)
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's name, or path or uri of a manifest.json or its folder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw, or with --image how to change it.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="FILE", help='A request a line: a prompt, or JSON as {"prompt": .., "images": [], "seed", "size", "out"}.'
        ),
    ] = None,
    images: Annotated[list[Path] | None, typer.Option("--image", help="A picture to edit, or to take from; may be repeated.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same picture.")] = 0,
    student: Annotated[bool, typer.Option("--student", help="Draws with the few-step student.")] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of the sampler; the recipe's when not given. A student has its own alone.")
    ] = None,
    enhance: Annotated[bool, typer.Option("--enhance", help="Rewrites each prompt with the model's Prompt Enhancer first.")] = False,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WxH", help="Pixels, multiples of 16, or 32 where the model sees images; the last stage's when not given."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--out", "-o", help="The PNG file; several prompts get numbered ones.")] = Path("sample.png"),
    site: SiteName = DEFAULT_SITE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Shows what would be drawn, and stops.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Prints a line of JSON a picture, for a script.")] = False,
) -> None:
    """Draws pictures with a trained model: a PNG for each prompt, which says how it was drawn; the same command, the same bytes."""
    where = find_site(site)
    from pipelines.picture_requests import defaults, read_requests, requests_of

    if bool(prompts) == (file is not None):
        raise UserError(f"sample: found {'both prompts and' if prompts else 'neither a prompt nor'} --file; allowed is one of them")
    given = defaults(seed=seed, size=size, images=images or [], output=output)
    requests = requests_of(prompts or [], given) if file is None else read_requests(file, given)
    from pipelines.sample import draw, find_model, plan

    published = find_model(where, model, student=student, steps=steps, enhance=enhance)
    drawn = (
        plan(published, requests, enhance=enhance)
        if dry_run
        else draw(published, requests, enhance=enhance, say=lambda line: typer.echo(line, err=True))
    )
    for picture in drawn:
        typer.echo(json.dumps(picture.to_json(), ensure_ascii=False) if as_json else picture.to_text(would=dry_run))


@app.command(epilog="Example: darkroom export demo-20261121-093000 my-model --parts transformer,scheduler")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's name, or path or uri of a manifest.json or its folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write; must be empty or not there yet.")],
    parts: Annotated[
        str | None,
        typer.Option(
            "--parts", metavar="A,B", help="Of transformer, vae, text_encoder, processor, scheduler; all that can be told when not given."
        ),
    ] = None,
    site: SiteName = DEFAULT_SITE,
    as_json: AsJson = False,
) -> None:
    """Writes a trained model as diffusers lays it out, for QwenImage21Pipeline; parts that it has no module for are left out."""
    where = find_site(site)
    from pipelines.export import export as write

    written = write(where, model, folder, parts=parts)
    _show(asdict(written) if as_json else str(written))


@app.command(epilog="Example: darkroom report demo-20261121-093000")
def report(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Name of a run; the newest when not given.")] = None,
    site: SiteName = DEFAULT_SITE,
    as_json: AsJson = False,
) -> None:
    """Shows what a run made: its steps, its scores, and where its report lies."""
    where = find_site(site)
    from pipelines.show import card, newest_run

    _show(card(run or newest_run(where), where, as_json=as_json, site_name=site))


@app.command(epilog="Example: darkroom label demo-20261121-093000 --dimension aesthetics --votes votes.jsonl")
def label(
    preferences: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MANIFEST", help="A run's name, or path or uri of the manifest.json of its pairs or its folder."),
    ],
    site: SiteName = DEFAULT_SITE,
    dimension: Annotated[
        str, typer.Option("--dimension", help="aesthetics, alignment, portrait, instruction_following or visual_consistency.")
    ] = "alignment",
    annotator: Annotated[str | None, typer.Option("--annotator", metavar="NAME", help="Whose votes; the account's when not given.")] = None,
    votes: Annotated[Path, typer.Option("--votes", metavar="FILE", help="The JSON Lines file that votes are added to.")] = Path(
        "votes.jsonl"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of this machine to serve on; 0 takes a free one.")] = 0,
    all_pairs: Annotated[bool, typer.Option("--all", help="Shows pairs that have a label already, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Opens a page on which a person says of each pair of pictures which is the better; every vote is kept at once."""
    where = find_site(site)
    from pipelines.labelling import command

    command.label(
        where,
        preferences,
        dimension=dimension,
        annotator=annotator,
        votes=votes,
        port=port,
        all_pairs=all_pairs,
        say=lambda line: typer.echo(line, err=as_json),
        on_opened=lambda opened: _show(asdict(opened) if as_json else command.opened_text(opened)),
    )


@app.command(epilog="Example: darkroom ui --port 5001")
def ui(
    site: SiteName = DEFAULT_SITE,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of this machine to serve on.")] = 5000,
) -> None:
    """Opens the site's history in MLflow: curves, parameters, lineage and registered models."""
    where = find_site(site)
    from pipelines.ui import serve

    sys.exit(serve(where, port=port))


@app.command(epilog="Example: darkroom verify ./workspace")
def verify(
    place: Annotated[str, typer.Argument(metavar="URI", help="A manifest.json, the folder of one, or a workspace.")],
    site: SiteName = DEFAULT_SITE,
    as_json: AsJson = False,
) -> None:
    """Reads every file that a manifest names again, and holds each training's ledger against the samples it should have used."""
    where = find_site(site)
    from pipelines.verify import verify as read_again

    result = read_again(place, where)
    for finding in result.findings:
        typer.echo(f"{finding.problem}: {finding.uri}", err=True)
    amount = f"{result.num_manifests} manifests, {result.num_files} files, {result.num_ledgers} ledgers, {result.num_bytes / 2**20:.1f} MiB"
    _show(asdict(result) if as_json else f"{amount}: {len(result.findings)} not as promised")
    if result.findings:
        raise typer.Exit(1)


@app.command(epilog="Example: darkroom gc --dry-run")
def gc(
    workspace: Annotated[
        str | None, typer.Argument(metavar="WORKSPACE", help="Path or uri of a workspace; the site's when not given.")
    ] = None,
    site: SiteName = DEFAULT_SITE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Shows what would be removed, and removes nothing.")] = False,
    grace_minutes: Annotated[
        float, typer.Option("--grace-minutes", min=0, help="Leaves alone what was changed later, unless its process is known to be dead.")
    ] = 60.0,
    unfinished_older_than: Annotated[
        float | None,
        typer.Option("--unfinished-older-than", metavar="DAYS", min=0, help="Removes what unfinished steps could go on from, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Removes what killed runs have left and no result needs; never a result, nor what a living step works on."""
    where = find_site(site)
    from pipelines.gc import collect, garbage_table, to_json

    collected = collect(
        workspace,
        where,
        grace_seconds=grace_minutes * 60,
        unfinished_older_than_seconds=None if unfinished_older_than is None else unfinished_older_than * 86400,
        dry_run=dry_run,
        say=lambda line: typer.echo(line, err=True),
    )
    _show(to_json(collected) if as_json else garbage_table(collected))


@app.command(epilog="Example: darkroom doctor --site my-site.yaml")
def doctor(site: SiteName = DEFAULT_SITE, as_json: AsJson = False) -> None:
    """Looks at this machine and a site, and says what a run would lack and how to mend it."""
    where = find_site(site)
    from pipelines.doctor import examine
    from pipelines.show import check_table

    checks = examine(where)
    _show([asdict(check) for check in checks] if as_json else check_table(checks))
    if not all(check.is_well for check in checks):
        raise typer.Exit(1)


def _show(value: Any) -> None:
    """JSON for lists and mappings, else text or a table for people."""
    if isinstance(value, list | dict):
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
    elif isinstance(value, str):
        typer.echo(value)
    else:
        out.print(value)


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(f"darkroom: {sentence}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
