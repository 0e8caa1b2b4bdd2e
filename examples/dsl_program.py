"""A program in SGLang's frontend language that asks two models of one server.

make serve
.venv/bin/python examples/dsl_program.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from typing import Any

import crosspool.sglang  # noqa: F401 - lets SGLang be imported where there is no Triton
import sglang as sgl


@sgl.function
def answer(s: Any, question: str) -> None:
    s += "Q: " + question + "\nA:"
    s += sgl.gen("answer", max_tokens=24, temperature=0, stop="\n")


@sgl.function
def choose(s: Any, statement: str) -> None:
    s += statement + " This is "
    s += sgl.select("verdict", choices=["true", "false"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address")
    url = parser.parse_args().url

    # Every model has an endpoint of its own under /m/<name>.
    writer = sgl.RuntimeEndpoint(f"{url}/m/tiny-qwen3-moe")
    judge = sgl.RuntimeEndpoint(f"{url}/m/tiny-deepseek-v2")

    written = answer.run(question="What does import do?", backend=writer)["answer"]
    print("answer:", written.strip())
    print("verdict:", choose.run(statement=written, backend=judge)["verdict"])


if __name__ == "__main__":
    main()
