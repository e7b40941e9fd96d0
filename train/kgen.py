"""KL_t of completions between two models or contexts: what K_gen (Eq. 4) and its change (Eq. 9) are
means of, in validation during training and in the KL diagnostic.

    KL_t  = KL(p_T(. | C_T, c_<t) || p_S(. | C_S, c_<t))   full vocabulary, float32
    K_gen = mean over t = 1..T of a sample, then over the samples of a task, then over tasks

Legend: R rows of a pack (T + 1 per completion of T tokens), D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.contexts import completion
from modeling.bagel import Bagel
from modeling.sequence import Segment, pack
from modeling.tokenizer import SpecialTokens
from train.losses import chunked_token_kl

TokenIds = tuple[int, ...]
TokenKL = list[list[float]]  # per completion, one value per row


@dataclass(frozen=True)
class Rows:
    """One side of Eq. 4: hidden states (R, D) at the completion rows, and the head they go to."""

    hidden: Tensor
    head: nn.Linear


@torch.no_grad()
def completion_rows(
    model: Bagel,
    contexts: Sequence[list[Segment]],
    completions: Sequence[TokenIds],
    tokens: SpecialTokens,
) -> Rows:
    """The rows that predict each completion and its closing token, all samples as one pack."""
    sequences = [
        [*context, *completion([token_ids])]
        for context, token_ids in zip(contexts, completions, strict=True)
    ]
    head = model.language_model.lm_head
    return Rows(model(pack(sequences, tokens).to(head.weight.device)), head)


def token_kls(
    teacher: Rows, student: Rows, completions: Sequence[TokenIds], include_end_row: bool = False
) -> TokenKL:
    """Eq. 4 before averaging: T values per completion, of the rows that predict c_1..c_T.

    `include_end_row` adds the row that predicts the closing token. Logits are float32 also where
    the hidden states are narrower.
    """
    kl = chunked_token_kl(
        teacher.hidden.float(), teacher.head, student.hidden.float(), student.head
    )
    per_completion = kl.split([len(token_ids) + 1 for token_ids in completions])
    return [(row if include_end_row else row[:-1]).tolist() for row in per_completion]
