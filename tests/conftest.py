"""How every test runs: no network, one thread, and tensor shapes checked at each call."""

import os
from pathlib import Path

# Before anything imports torch or transformers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

from jaxtyping import install_import_hook  # noqa: E402

import tests.runtime_types  # noqa: E402, F401

# Only the modules that annotate shapes; the others check users' input themselves, and tests hand them wrong types.
ROOT = Path(__file__).parent.parent
SHAPED = [path for path in (ROOT / "probe").rglob("*.py") if "jaxtyping" in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SHAPED]
install_import_hook(MODULES, "tests.runtime_types.check")
