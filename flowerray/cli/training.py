"""`flowerray train` and `flowerray demo`."""

from flowerray.cli.options import (
    default_out,
    end_of_logging,
    parse_run,
    pick_device,
    resumable,
    take_method,
)


def train(words: list[str]) -> int:
    """`flowerray train METHOD [options]`."""
    method, words = take_method("train", words)
    options, run = parse_run(f"train {method}", method, words)
    from flowerray.cluster.driver import head_first, train_run
    from flowerray.training.table import training

    out = options.resume or options.out or default_out(method)
    with resumable(f"train {method}", out, "run.json"):
        summary = train_run(head_first(run, out), out, resume=options.resume is not None)
    print(training(out, summary))
    end_of_logging(out)
    return 0


def demo(words: list[str]) -> int:
    """`flowerray demo`: the main job on rendered flowers, start to end."""
    from pydantic import Field

    from flowerray.cli.serve import HOST, PORT, serve

    about = "Renders 40 species, trains triplet, and measures it beside the untrained backbone."
    help = f"In the end an index of the photographs, with a page on port {PORT}: `flowerray serve`."
    options, run = parse_run(
        "demo", "triplet", words, default_preset="demo", about=about,
        serve=(bool, Field(False, description=help)),
    )  # fmt: skip
    if options.serve:
        from flowerray.serve.deployment import require

        require(HOST, PORT)  # before minutes of work
    from flowerray.cluster.driver import train_run
    from flowerray.index.command import add, build
    from flowerray.opening import open_model
    from flowerray.retrieval.command import evaluate_model
    from flowerray.retrieval.measure import EvaluateConfig
    from flowerray.retrieval.table import measurement
    from flowerray.training.table import training

    out = options.resume or options.out or default_out("demo")
    with resumable("demo", out, "run.json"):
        summary = train_run(run, out, resume=options.resume is not None)
    device = pick_device("auto")
    model = open_model(str(out), device)
    found = evaluate_model(model, run.data, False, EvaluateConfig())
    print(training(out, summary))
    print(measurement(str(out), found))
    end_of_logging(out)
    if options.serve:
        root, index = model.own_dataset().root, out / "index"
        _ = add(index, [root], model.embedder) if index.exists() else build(model, root, index)
        return serve([str(index)])
    return 0
