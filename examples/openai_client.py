"""Chat with every model of a CrossPool server through OpenAI's client.

After `make serve`:

    .venv/bin/python examples/openai_client.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import json

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["statement", "expression"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address")
    client = OpenAI(base_url=f"{parser.parse_args().url}/v1", api_key="none")

    models = [model.id for model in client.models.list()]
    for model in models:
        print(f"{model}: ", end="")
        for chunk in client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is a module?"}],
            max_tokens=24,
            temperature=0,
            stream=True,
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

    # A JSON schema binds the output to what a program can read, also with a tiny model.
    reply = client.chat.completions.create(
        model=models[0],
        messages=[{"role": "user", "content": "Is `import os` a statement or an expression?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True},
        },
        max_tokens=64,
        temperature=0,
    )
    print("as JSON:", json.loads(reply.choices[0].message.content or ""))


if __name__ == "__main__":
    main()
