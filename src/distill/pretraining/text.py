"""Tokenizer and CLIP-type text/image encoders, trained on the captions and pictures at hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill.pretraining.fit import DEVICE, Budget, fit

WIDTH = 128


def train_tokenizer(captions: list[str], *, length: int, vocab_size: int = 2048) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's own layout: 256 bytes, the same at a word's end, then merges of words."""
    blank = CLIPTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    blank.backend_tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    state = blank.backend_tokenizer.model.__getstate__()
    merges = [tuple(pair) for pair in json.loads(state)["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build(tokenizer: CLIPTokenizer, side: int) -> CLIPModel:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    text = {
        **shared,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": 3, "image_size": side, "patch_size": side // 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    # A diffusion model reads words, and an MMDiT their order too, from these hidden states alone. From CLIP's usual
    # 0.02 the residual stream soon drowns both: teachers learnt backgrounds and colours but no kind and no order.
    embeddings = clip.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    return clip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> token ids [N, L], padded and cut to the encoder's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train(
    pictures: Tensor, captions: list[str], tokenizer: CLIPTokenizer, budget: Budget, *, out: Path, seed: int = 0
) -> tuple[CLIPModel, dict[str, float]]:
    """Contrastive training (InfoNCE both ways); retrieval accuracy among 100 held-out pairs."""
    torch.manual_seed(seed)
    clip = build(tokenizer, pictures.shape[-1])
    ids = tokenize(tokenizer, captions)
    held = max(200, len(ids) // 100)

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(ids) - held, (budget.batch_size,), generator=generator)
        x = pictures[index].to(DEVICE).float() / 127.5 - 1
        logits = clip(input_ids=ids[index].to(DEVICE), pixel_values=x).logits_per_image.float()
        target = torch.arange(len(index), device=DEVICE)
        return {"image": F.cross_entropy(logits, target) / 2, "text": F.cross_entropy(logits.T, target) / 2}

    seconds = fit("clip", clip, objective, budget, out=out, seed=seed)
    clip.eval().requires_grad_(False)
    return clip, {"top1_of_100": _retrieval(clip, ids[-held:], pictures[-held:]), "seconds": seconds}


@torch.no_grad()
def _retrieval(clip: CLIPModel, ids: Tensor, pictures: Tensor, group: int = 100) -> float:
    hits = []
    for i in range(0, len(ids) - group + 1, group):
        x = pictures[i : i + group].float() / 127.5 - 1
        logits = clip(input_ids=ids[i : i + group], pixel_values=x).logits_per_image
        hits.append((logits.argmax(1) == torch.arange(group)).float().mean())
    return float(torch.stack(hits).mean())
