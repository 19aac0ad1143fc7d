"""Train the embedded model: a Qwen3-MoE of 7.6 million parameters on the text of `dynaexq.cli.demo_corpus`.

    python examples/tiny-moe/train.py --output-dir /tmp/tiny-moe
    python examples/tiny-moe/train.py --output-dir /tmp/second --text DIR --num-experts 64 --num-experts-per-tok 6

The second command makes a model of other sizes on other text (`debian_text.py` writes some), to see what carries over.

Four layers of 32 experts (top-4), hidden size 256, a byte-level BPE of 2,048 tokens. Weights and optimizer stay in
float32 while training (matrix products run in bfloat16 autocast); they are rounded once, to bfloat16, when saved.
The load-balancing loss is taken per layer over a batch that mixes the domains, so that experts may specialize.
"""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dynaexq.cli.demo_corpus import Corpus

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
MIXTURE = {"prose": 0.35, "code": 0.4, "arithmetic": 0.25}
BALANCE_WEIGHT = 0.01
ARITHMETIC_DOCUMENTS = 2000


def unbind_experts_forward(experts, hidden_states, top_k_index, top_k_weights):
    """The experts' forward with rows grouped by expert and the weights unbound.

    Indexing a 3-D parameter per expert makes autograd add up as many full-size gradients; `unbind` makes one.
    """
    counts = torch.bincount(top_k_index.reshape(-1), minlength=experts.num_experts).tolist()
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    token = order // top_k_index.shape[1]
    rows = zip(
        hidden_states[token].split(counts), experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True
    )
    outputs = [F.linear(experts._apply_gate(F.linear(x, gate_up)), down) for x, gate_up, down in rows]
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits split one by one, trained on equal shares of every kind of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = sum(map(len, corpus.documents(corpus.kinds[0], "train")))
    texts = []
    for kind in corpus.kinds:
        remaining = share
        for text in corpus.documents(kind, "train"):
            texts.append(text[:remaining])
            remaining -= len(text)
            if remaining <= 0:
                break
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, kind: str, split: str) -> torch.Tensor:
    """All documents of one kind as one row of token ids, each document closed by the end-of-text token."""
    texts = corpus.documents(kind, split)
    if kind == "arithmetic":  # which never ends
        texts = itertools.islice(texts, ARITHMETIC_DOCUMENTS if split == "train" else 50)
    ids = tokenizer([text + END_OF_TEXT for text in texts])["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int32)


def batch_of(
    streams: dict[str, torch.Tensor], batch_size: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """`[batch_size, length]` windows at random places, mixed as `MIXTURE` says, other kinds evenly."""
    rows = []
    for kind, stream in streams.items():
        share = MIXTURE.get(kind, 1 / len(streams))
        starts = torch.randint(len(stream) - length, (round(share * batch_size),), generator=generator).tolist()
        rows += [stream[start : start + length] for start in starts]
    return torch.stack(rows).long()


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of the Switch Transformer's load-balancing loss; 1 when perfectly balanced."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(top_k, -1).indices, 1.0 / top_k)
        losses.append(logits.shape[-1] * (chosen.mean(0) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def build_model(num_experts: int, num_experts_per_tok: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE_WEIGHT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    ALL_EXPERTS_FUNCTIONS.register("unbind", unbind_experts_forward)
    config._experts_implementation = "unbind"
    return Qwen3MoeForCausalLM(config)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 2 %, cosine decay to a fiftieth of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, streams: dict[str, torch.Tensor], length: int) -> dict[str, float]:
    """Mean cross entropy in nats per token over the first windows of each held-out stream."""
    losses = {}
    for kind, stream in streams.items():
        windows = stream[: min(len(stream) // length, 24) * length].view(-1, length).long()
        with torch.autocast("cpu", torch.bfloat16):
            losses[kind] = round(float(model(windows, labels=windows).loss), 4)
    return losses


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path, record: dict) -> None:
    rounded = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main(
    output_dir: Annotated[Path, typer.Option(help="Where the model and its tokenizer go.")] = Path(__file__).parent,
    text: Annotated[Path | None, typer.Option(help="Other text: a directory of files KIND.txt.")] = None,
    num_experts: Annotated[int, typer.Option(help="Experts of each layer.")] = 32,
    num_experts_per_tok: Annotated[int, typer.Option(help="Experts for each token.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 5000,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 20,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    peak_lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of weights and windows.")] = 0,
) -> None:
    """Train the embedded tiny Mixture-of-Experts model on the CPU."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    corpus = Corpus(text)
    tokenizer = train_tokenizer(corpus)
    train, held_out = (
        {kind: token_stream(tokenizer, corpus, kind, split) for kind in corpus.kinds}
        for split in ("train", "held-out")
    )
    print({kind: len(stream) for kind, stream in train.items()}, "training tokens")

    model = build_model(num_experts, num_experts_per_tok)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95), fused=True)

    begun = time.time()
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, peak_lr)
        windows = batch_of(train, batch_size, length, generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(windows, output_router_logits=True, use_cache=False)
            logits = model.lm_head(output.last_hidden_state[:, :-1])
            cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
            loss = cross_entropy + BALANCE_WEIGHT * balance_loss(
                output.router_logits, model.config.num_experts_per_tok
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{cross_entropy.item():.3f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            losses = held_out_loss(model, held_out, length)
            record = {"steps": step + 1, "tokens": (step + 1) * windows.numel(), "held_out_loss": losses}
            record |= {"seconds": round(time.time() - begun), "torch": torch.__version__, "seed": seed}
            save(model, tokenizer, output_dir, record)
            progress.write(json.dumps(record))


if __name__ == "__main__":
    typer.run(main)
