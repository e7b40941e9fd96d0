"""Every prompt string, once. Training, inference and evaluation share the system prompt."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptSet:
    """The fixed texts around an example. An empty string leaves its block out.

    `instruction_suffix` is appended to the question before tokenisation.
    """

    name: str
    system: str
    reference_intro: str
    transition: str
    instruction_suffix: str = ""


# The wording is an interface: released weights were trained on it, the mismatched
# "<image_start> </image_end>" and the missing space in "i.e.<answer>" included.
PAPER = PromptSet(
    name="paper",
    system=(
        "\nLet's think step by step to answer the question. For text-based thinking, enclose the "
        "process within <think> </think>, e.g. <think> thinking process here </think>. For visual "
        "thinking, enclose the content within <image_start> </image_end>, e.g. <image_start> "
        "thinking image here </image_end>. Finally conclude with the final answer wrapped in "
        "<answer></answer> tags, i.e.<answer> answer here </answer>.\n"
    ),
    reference_intro=(
        "The following images are privileged visual references that depict the intermediate visual "
        "thoughts on the path to the correct answer. Use them silently as grounding context; do "
        "not describe or echo them."
    ),
    transition=(
        "Now, using your own independent reasoning, answer the problem above. Think step by step."
    ),
)

# The miniature vocabulary holds these words; long prompts would dominate its sequences.
MINI = PromptSet(
    name="mini", system="look and answer", reference_intro="hint", transition="now answer"
)

PROMPT_SETS = {prompts.name: prompts for prompts in (PAPER, MINI)}
