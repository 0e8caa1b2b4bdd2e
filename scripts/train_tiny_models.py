"""Trains the tiny MoE language models that CrossPool bundles for demos and tests.

    python scripts/train_tiny_models.py                         # all three, about 12 minutes each
    python scripts/train_tiny_models.py --only tiny-qwen3-moe --minutes 2
    python scripts/train_tiny_models.py --steps 1500 --seed 7 --out /tmp/models
    python scripts/train_tiny_models.py --only wide-qwen3-moe --out /tmp/models  # is not bundled

Each model learns its own freely licensed text (``tiny_corpus.py``) nearly by heart, as plain text
and as chat answers; the shapes are in ``tiny_recipes.py``. With ``--steps`` a run is seeded, up to
rounding that differs between machines and thread counts; with ``--minutes`` the number of steps
follows the speed of the machine. The bundled models were trained with one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from make_random_checkpoint import save_hub_config
from tiny_corpus import SOURCES, TOOLS_TEMPLATE, Chat, Passage, chats
from tiny_recipes import RECIPES, Recipe, build_tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_STEP = 2048
# Most rows are short, which is cheap; the long ones keep the model from falling apart further out.
ROW_LENGTHS = {256: 0.62, 512: 0.25, 1024: 0.1, 2048: 0.03}
CHAT_ROUNDS = 12
PHASES_FILE = "training.json"
DEMO_DIR = Path(__file__).resolve().parent.parent / "python" / "crosspool" / "demo"


@dataclass(frozen=True)
class Phase:
    """One run of this script on one model. ``resume`` continues from the weights of the last
    run."""

    steps: int | None
    seed: int
    chat_share: float
    resume: bool

    def command(self, name: str) -> str:
        """The command line that repeats this phase."""
        options = f"--steps {self.steps} --seed {self.seed} --chat-share {self.chat_share}"
        if self.resume:
            options += " --resume"
        return f"    python scripts/train_tiny_models.py --only {name} \\\n        {options}"


class Batches:
    """Endless batches of rows, each of which is plain text or a row of conversations."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passages: list[Passage],
        tools: bool,
        phase: Phase,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_share = phase.chat_share
        self.rng = random.Random(phase.seed)
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.text: list[int] = []
        for passage in passages:
            self.text += tokenizer.encode(passage.text, add_special_tokens=False)
            self.text.append(tokenizer.pad_token_id)
        self.chats = [
            self._chat_tokens(chat) for chat in chats(passages, self.rng, CHAT_ROUNDS, tools)
        ]

    def _chat_tokens(self, chat: Chat) -> list[int]:
        text = self.tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        text = text.removeprefix(self.tokenizer.bos_token or "")
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _row(self, length: int) -> list[int]:
        row = list(self.bos)
        if self.rng.random() >= self.chat_share:
            start = self.rng.randrange(len(self.text))
            row += (self.text[start:] + self.text)[:length]
        while len(row) < length:
            row += self.rng.choice(self.chats)
        return row[:length]

    def next(self) -> torch.Tensor:
        """One batch of token ids, rows of one length, :data:`TOKENS_PER_STEP` in all."""
        length = self.rng.choices(list(ROW_LENGTHS), list(ROW_LENGTHS.values()))[0]
        return torch.tensor([self._row(length) for _ in range(TOKENS_PER_STEP // length)])

    def text_rows(self, length: int = 512) -> Iterator[torch.Tensor]:
        """The whole plain text once, cut into rows: the text of the loss on the model card."""
        step = length - len(self.bos)
        for start in range(0, len(self.text) - step, step):
            yield torch.tensor([self.bos + self.text[start : start + step]])


class ExpertBalance:
    """Keeps all experts in use, whatever the family.

    Softmax routers get the usual load balancing loss; a sigmoid router with a correction bias gets
    the bias updates that its family was trained with, without a loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.top_k = model.config.num_experts_per_tok
        self.losses: list[torch.Tensor] = []
        self.bias_speed = 2e-3
        for module in model.modules():
            if hasattr(module, "gate") and hasattr(module, "experts"):
                module.register_forward_pre_hook(self._observe)

    def _observe(self, block: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not block.training:
            return
        logits = F.linear(args[0], block.gate.weight).flatten(0, -2)
        bias = getattr(block.gate, "e_score_correction_bias", None)
        scores = logits.softmax(-1) if bias is None else logits.sigmoid() + bias
        chosen = scores.topk(self.top_k).indices
        load = F.one_hot(chosen, scores.shape[-1]).float().mean((0, 1))
        if bias is None:
            self.losses.append(scores.shape[-1] * (load * scores.mean(0)).sum())
        else:
            bias -= self.bias_speed * torch.sign(load.detach() - load.mean())

    def loss(self) -> torch.Tensor | float:
        """The balancing loss of the last forward pass."""
        losses, self.losses = self.losses, []
        return sum(losses) / len(losses) if losses else 0.0


def learning_rate(progress: float, peak: float) -> float:
    """Returns the rate: a short linear warm-up, then a cosine to a hundredth of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (progress - 0.03) / 0.97)).item())
    return peak * (0.01 + 0.99 * cosine)


def train(
    model: PreTrainedModel, batches: Batches, recipe: Recipe, minutes: float, phase: Phase
) -> int:
    """Trains until the steps are done or, where none are given, ``minutes`` are over."""
    steps, peak_lr = phase.steps, recipe.peak_lr / (3 if phase.resume else 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    balance = ExpertBalance(model)
    model.train()
    began = time.monotonic()
    done, average = 0, None
    with tqdm(total=steps, desc=recipe.name, mininterval=5) as bar:
        while True:
            progress = done / steps if steps else (time.monotonic() - began) / (60 * minutes)
            if progress >= 1:
                return done
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak_lr)
            ids = batches.next()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss + 0.01 * balance.loss()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            average = loss.item() if average is None else 0.97 * average + 0.03 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{average:.3f}", refresh=False)


@torch.inference_mode()
def text_loss(model: PreTrainedModel, batches: Batches) -> float:
    """Returns the mean loss over the whole plain text, in nats per token."""
    model.eval()
    losses = [model(input_ids=row, labels=row).loss.item() for row in batches.text_rows()]
    return sum(losses) / len(losses)


@torch.inference_mode()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Returns what the model says to ``question``, greedily."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def model_card(
    recipe: Recipe, phases: list[Phase], facts: dict[str, str], question: str, answer: str
) -> str:
    """Returns the README of a bundled model."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    quote = answer.replace("\n", "\n> ")
    commands = "\n".join(phase.command(recipe.name) for phase in phases)
    return f"""\
# {recipe.name}

A tiny mixture-of-experts language model for demos and tests of CrossPool. It has the layout of its
big relatives, knows one small text nearly by heart and nothing else, and is of no other use.

| | |
|---|---|
{rows}

Asked "{question}", it answers (greedy, at most 80 tokens):

> {quote}

The text is read from the machine that trains the model and is not part of this repository. To make
the model again (other Python versions carry slightly different texts):

{commands}
"""


def make(recipe: Recipe, out: Path, minutes: float, phase: Phase) -> None:
    """Trains one model and puts it in place of ``out`` in one rename."""
    torch.manual_seed(phase.seed)
    passages = SOURCES[recipe.source](recipe.characters)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        spoken = [
            f"{turn['role']}\n{turn['content']}"
            for chat in chats(passages, random.Random(0), 1, recipe.tools)
            for turn in chat.messages
        ]
        if recipe.tools:
            spoken += [TOOLS_TEMPLATE] * 4
        texts = [passage.text for passage in passages]
        tokenizer = build_tokenizer(recipe, texts + spoken, work)
        batches = Batches(tokenizer, passages, recipe.tools, phase)
        config = getattr(transformers, recipe.config_class)(
            **recipe.shape,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        phases: list[Phase] = []
        if phase.resume:
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            phases = [Phase(**past) for past in json.loads((out / PHASES_FILE).read_text())]
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # The padding token also ends each text, so its embedding must learn.
        model.get_input_embeddings().padding_idx = None
        done = train(model, batches, recipe, minutes, phase)
        phases.append(replace(phase, steps=done))
        for parameter in model.parameters():  # not the buffers: correction biases stay float32
            parameter.data = parameter.data.to(torch.bfloat16)
        model.save_pretrained(work)
        save_hub_config(model.config, work)
        saved = AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32)
        shape = saved.config
        experts = recipe.shape.get("n_routed_experts") or recipe.shape["num_experts"]
        facts = {
            "architecture": f"`{shape.architectures[0]}`: {recipe.layout}",
            "shape": f"{shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, "
            f"{shape.num_attention_heads} heads, {experts} experts of size "
            f"{shape.moe_intermediate_size} with {shape.num_experts_per_tok} per token, "
            f"vocabulary {shape.vocab_size}",
            "parameters": f"{saved.num_parameters():,}, saved in bfloat16",
            "tokenizer": "SentencePiece BPE with byte fallback"
            if recipe.sentencepiece
            else "byte-level BPE",
            "text": f"{sum(map(len, texts)):,} characters of {recipe.source_text}",
            "loss over the text": f"{text_loss(saved, batches):.3f} nats per token (saved weights)",
            "steps": str(sum(past.steps or 0 for past in phases)),
            "made with": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        }
        question = f"Tell me about {passages[0].title}"
        card = model_card(recipe, phases, facts, question, sample(saved, tokenizer, question))
        (work / "README.md").write_text(card)
        (work / PHASES_FILE).write_text(json.dumps([asdict(past) for past in phases]) + "\n")
        print(card)
        for path in work.iterdir():
            path.chmod(0o644)
        work.chmod(0o755)
        old = out.with_name(f".{out.name}-old")
        if out.exists():
            out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Parses the command line and trains the chosen models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this model and no other")
    parser.add_argument("--minutes", type=float, default=12, help="time per model (default: 12)")
    parser.add_argument("--steps", type=int, help="steps per model, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chat-share", type=float, default=0.4, help="rows of conversations (default: 0.4)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="train the models in their folders further"
    )
    parser.add_argument("--out", type=Path, default=DEMO_DIR, help="folder of the model folders")
    args = parser.parse_args()
    bundled = [name for name, recipe in RECIPES.items() if recipe.bundled]
    for name in [args.only] if args.only else bundled:
        phase = Phase(args.steps, args.seed, args.chat_share, args.resume)
        make(RECIPES[name], args.out / name, args.minutes, phase)


if __name__ == "__main__":
    main()
