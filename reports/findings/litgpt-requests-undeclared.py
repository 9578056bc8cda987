"""LitGPT: without the package requests no command starts and no checkpoint is saved to the end.

Every LitGPT command, and save_hyperparameters at every checkpoint, calls jsonargparse's
set_config_read_mode(urls_enabled=True), which imports requests. LitGPT 0.5.13 asks for it only in its extra "extra",
and none of the packages it needs brings it. Hides requests, as if it were not installed.
"""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

sys.modules["requests"] = None  # type: ignore[assignment] # from here on, import requests fails


def command() -> None:
    from litgpt.__main__ import main

    main()


def checkpoint() -> None:
    from litgpt import parser_config, pretrain

    with tempfile.TemporaryDirectory() as folder:
        parser_config.save_hyperparameters(pretrain.setup, Path(folder))


print("litgpt declares:", [line for line in importlib.metadata.requires("litgpt") or [] if "requests" in line])
for call in (command, checkpoint):
    sys.argv = ["litgpt", "pretrain", "pythia-14m"]
    try:
        call()
    except ImportError as error:
        print(f"{call.__name__}: ImportError: {error}")
