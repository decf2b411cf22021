"""How the error of a run's first blocks falls with Adam's steps, beside `lr`'s closed form.

    python benchmarks/recovery/steps.py RUN --domain medical --blocks 5 --fits lr,br:3,br:30,br:30:1e-3

A fit is a method, passes over the windows (a step of Adam a window) and a learning rate. Both models are cut after
`--blocks`, which is all that these blocks know of. Prints a row a fit, no file. Run where `data/` is, as `study.py`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from study import TEXT, Study, ids

import atp
from atp.loading import load_dense
from atp.recovery import RecoverySettings, Texts, recover
from atp.structure.live import causal_lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--domain", choices=TEXT, required=True)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--fits", default="lr,br:3,br:30")
    words = parser.parse_args()
    looked_at = {"length": 256, "held_out_windows": 16, "test_windows": 0, "other_windows": 0}
    study = Study(argparse.Namespace(**vars(words), **looked_at))
    texts = Texts(ids(study.calibration(words.windows, 0.0, 0)), ids(study.held_out), None)
    for fit in words.fits.split(","):
        given = dict(zip(("method", "epochs", "learning_rate"), fit.split(":"), strict=False))
        settings = RecoverySettings(
            method=given["method"],
            epochs=int(given.get("epochs", 1)),
            learning_rate=float(given.get("learning_rate", RecoverySettings.learning_rate)),
            batch_size=1,
            keep_best=False,
        )
        models = load_dense(words.run), atp.load(Path(words.run) / "pruned")
        teacher, student = (cut(model, words.blocks) for model in models)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            outcome = recover(teacher, student, texts, settings, Path(work), quiet=True).to_dict()
        row = {"fit": fit, "seconds": round(time.perf_counter() - start), "blocks": outcome["blocks"]}
        print(json.dumps(row), flush=True)


def cut(model: Any, blocks: int) -> Any:
    """`model` without its later blocks."""
    lm = causal_lm(model)
    lm.model.layers = lm.model.layers[:blocks]
    lm.config.num_hidden_layers = blocks
    return model


if __name__ == "__main__":
    main()
