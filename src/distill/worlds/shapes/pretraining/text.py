"""Tokenizer and CLIP-type text/image encoders, trained on the captions and pictures."""

import json
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from distill.storage.atomic import atomic_folder
from distill.worlds.shapes.pretraining.assemble import half_of, save_half
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels

WIDTH = 128


def train_tokenizer(captions: list[str], *, length: int, vocab_size: int = 2048) -> CLIPTokenizer:
    """Byte-pair encoding in CLIP's layout: 256 bytes, the same at a word's end, then merges."""
    blank = CLIPTokenizer()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=letters
    )
    blank.backend_tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    state = blank.backend_tokenizer.model.__getstate__()
    merges = [tuple(pair) for pair in json.loads(state)["merges"]]
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def build(tokenizer: CLIPTokenizer, side: int) -> CLIPModel:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    shape["num_hidden_layers"] = 3
    ends = {
        f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")
    }
    text = {
        **shape,
        **ends,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }
    vision = {**shape, "image_size": side, "patch_size": side // 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    # Eager: as for the ViT, half the time of a step in half precision on a CPU.
    clip = CLIPModel._from_config(config, attn_implementation="eager")
    # A diffusion model gets words, and an MMDiT also their order, from these hidden states alone.
    # With CLIP's usual 0.02 the residual stream hides both: teachers learnt backgrounds and colours
    # but neither kind nor order.
    embeddings = clip.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    return clip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions -> token ids [N, L], padded and cut to the encoder's length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _tokenized(work: Work) -> tuple[CLIPTokenizer, Tensor]:
    """The tokenizer, which is saved, and the captions' ids [N, L].

    The library numbers equally frequent pairs in arbitrary order, so a resumed text encoder must
    get the same tokenizer.
    """
    kept = work.train / "tokenizer"
    if kept.is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(kept)
        return tokenizer, tokenize(tokenizer, work.captions)
    tokenizer = train_tokenizer(work.captions, length=work.asked["text_length"])
    ids = tokenize(tokenizer, work.captions)
    with atomic_folder(kept) as part:
        tokenizer.save_pretrained(part)
    return tokenizer, ids


def train(work: Work) -> dict[str, Any]:
    """Contrastive training (InfoNCE both ways); retrieval accuracy among 100 held-out pairs."""
    pictures, fit = work.pictures, work.fit("clip")
    tokenizer, ids = _tokenized(work)
    learnt = len(ids) - max(200, len(ids) // 100)
    torch.manual_seed(fit.seed)
    clip = build(tokenizer, pictures.shape[-1])

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = pixels(pictures[index].to(DEVICE))
        logits = clip(input_ids=ids[index].to(DEVICE), pixel_values=x).logits_per_image.float()
        target = torch.arange(len(index), device=DEVICE)
        return {
            "image": F.cross_entropy(logits, target) / 2,
            "text": F.cross_entropy(logits.T, target) / 2,
        }

    fit(clip, objective, samples=learnt)
    with atomic_folder(work.train / "clip") as part:
        clip.save_pretrained(part)
    save_half(half_of(clip, CLIPVisionModelWithProjection, "vision"), work.models / "clip_vision")
    groups = [
        (ids[i : i + 100], pixels(pictures[i : i + 100])) for i in range(learnt, len(ids) - 99, 100)
    ]
    found = [clip(input_ids=i, pixel_values=x).logits_per_image.argmax(1) for i, x in groups]
    top1 = torch.stack([(each == torch.arange(100)).float().mean() for each in found]).mean()
    return {"top1_of_100": float(top1), "seconds": fit.seconds, "vocabulary": len(tokenizer)}
