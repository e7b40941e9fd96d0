"""The claims of the paper that the ledger goes through, and what stands behind them.

Reasons are about how things are built, never about what came out: they stay true when numbers move.
"""

from eval.artefacts.ledger import (
    CONTROL_LIMIT,
    FLAT,
    MARGIN,
    SMALL,
    TERSE,
    Claim,
    attends_to_vt,
    average_of_nine,
    barely_changes,
    beats,
    best_value,
    closes,
    content_words,
    faster,
    gap_exists,
    gap_follows_gain,
    insensitive,
    minimiser_is_reference,
    noise_below_start,
    noise_closes_little,
    noise_like_sft,
    right_pictures_move_most,
    shorter,
)

INTERVAL = "the 95 % interval of the paired difference, on the mean over seeds, lies above 0"
NEAR = f"within {FLAT:.0f} points"
NEEDS_PICTURES = (
    "The miniature's base was trained to need its pictures, so that there is something to distil."
)
SFT_SEES = "SFT is given the reference texts; OPSD sees neither texts nor answers."
LENGTHS = "A problem of the miniature has one text; what draws also writes marks around pictures."

CLAIMS = (
    Claim(
        "Visual thoughts in context shift the model's predictions on the same completion",
        "Table 1", "4.64 nats per token",
        "true pictures move the base further than the prompts around them alone, in every seed",
        "table1", gap_exists,
        "Magnitudes do not compare: another model, other texts, another measure of the release.",
    ),
    Claim(
        "The shift is due to what the visual thoughts show",
        "App. F", "–", "right pictures move the base further than any wrong ones",
        "controls", right_pictures_move_most,
        "K_gen says how far a picture moves a model, not whether it helps; the accuracies under "
        "the same controls say that.",
    ),
    Claim(
        "The divergence sits in content words; function words carry next to none",
        "Fig. 6, App. F", "–",
        f"function words have less than {SMALL:.0%} of the mean KL of content words",
        "figure6", content_words,
        "The miniature's language has few function words: see the table by class.",
    ),
    Claim(
        "Distillation closes most of the gap",
        "Table 5", "58.4 %", "more than half of the gap is closed", "table5", closes,
    ),
    Claim(
        "The noise control closes next to nothing",
        "Table 5", "3.5 %",
        f"within {CONTROL_LIMIT:.0f} points of 0, and at least {MARGIN:.0f} below real VTs",
        "table5", noise_closes_little,
    ),
    Claim(
        "The student beats its untrained self in text alone",
        "Table 2 with the data of Fig. 3a", "74.03 against 69.90", INTERVAL, "table2",
        beats("opsd", "base"), "The paper's table leaves this baseline out.",
    ),
    Claim(
        "The student beats text-only SFT, which starts from the model before it drew",
        "Tables 2, 3", "+10.28", INTERVAL, "table2", beats("opsd", "sft"), SFT_SEES,
    ),
    Claim(
        "The student beats text-only SFT from the same model",
        "not run in the paper", "–", INTERVAL, "table2", beats("opsd", "sft_base"),
        f"{SFT_SEES} Where every problem has one right text, that is the better teacher. The paper "
        "leaves this baseline out since its model had been trained on these rows.",
    ),
    Claim(
        "The student beats the noise control",
        "Table 3", "74.03 against 64.15", INTERVAL, "table3", beats("opsd", "noise"),
    ),
    Claim(
        "The noise control ends where text-only SFT does",
        "Table 3", "+0.40", f"{NEAR} of it", "table3", noise_like_sft,
        "Nothing ties the two: SFT learns from reference texts, the control learns what the base "
        "does with noise in its context.",
    ),
    Claim(
        "The noise control ends below the model that it started from",
        "Table 2 with the data of Fig. 3a", "64.15 against 69.90",
        "the 95 % interval of the paired difference lies below 0", "table3", noise_below_start,
        "It can be expected to end where the base is with noise in its context: see the controls.",
    ),
    Claim(
        "The student beats the model that draws",
        "Table 2", "+3.40", INTERVAL, "table2", beats("opsd", "thinkmorph"),
        "How far depends on how well the model draws; the controls have what the base makes of "
        "true pictures.",
    ),
    Claim(
        "Text-only answers are an order of magnitude faster",
        "Table 2", "14.3 times", "more than 5 times", "figure7", faster,
        "The ratio depends on picture size, grid points, guidance and machine, which the table of "
        "seconds names.",
    ),
    Claim(
        "Leaving the visual thoughts out barely changes accuracy",
        "Fig. 3a", "70.63 to 69.90", NEAR, "figure3a", barely_changes("systems", "base"),
        NEEDS_PICTURES,
    ),
    Claim(
        "Noise in the place of the visual thoughts barely changes accuracy",
        "Fig. 3a", "–", NEAR, "figure3a", barely_changes("systems", "thinkmorph-noise"),
        NEEDS_PICTURES,
    ),
    Claim(
        "Text after a picture attends to it almost exclusively",
        "Fig. 3b", "10.6 % at most on the figure's own axis", "more than half of all attention",
        "figure3b", attends_to_vt("drawn"), "The figure has where the rest goes.",
    ),
    Claim(
        "It does so whatever the picture shows, noise too",
        "Fig. 3b", "no series for noise", "more than half of all attention", "figure3b",
        attends_to_vt("noise"), "The figure has both, layer by layer.",
    ),
    Claim(
        "The result is robust to the number of kept entries",
        "Table 6", "79.50 to 83.05", f"{NEAR} of the default", "table6", insensitive("jsd_top_k"),
        "One seed each: see Table 6.",
    ),
    Claim(
        "The result is robust to the clip",
        "Table 6", "79.83 to 83.05", f"{NEAR} of the default", "table6",
        insensitive("jsd_token_clip"),
        "Entries above the clip have no gradient; the fewer entries carry the divergence, the more "
        "is lost.",
    ),
    Claim(
        "A clip of .05 is best",
        "Table 6", "83.05", "no other value ends above it", "table6",
        best_value("jsd_token_clip", "0.05"), "One seed each: see Table 6.",
    ),
    Claim(
        "Tasks whose gap closes most gain most",
        "App. I", "–", "the tasks rank alike by gap closed and by points over the untrained base",
        "table5", gap_follows_gain,
        "Points gained depend on where a task started. The paper compares with the model that "
        "draws.",
    ),
    Claim(
        "Forward KL to many noisy teachers is smallest at the noise-free reference",
        "Theorem 1", "–", "the minimiser is the reference for all sizes of noise", "theorem",
        minimiser_is_reference,
        "The minimiser is the arithmetic mean of the teachers; the reference is their geometric "
        "mean.",
    ),
    Claim(
        "The student answers with half the tokens of the model that draws",
        "Table 4", "201 against 452", f"at most {TERSE:.0%} of its tokens", "table4",
        shorter("thinkmorph"), LENGTHS,
    ),
    Claim(
        "The student answers with half the tokens of text-only SFT",
        "Table 4", "201 against 411", f"at most {TERSE:.0%} of its tokens", "table4",
        shorter("sft"), LENGTHS,
    ),
    Claim(
        "74.03 % over nine benchmarks, 6 of 9 above the model that draws",
        "Table 2", "74.03 %", "above it on more than half of the nine", "table2", average_of_nine,
        "Needs checkpoints of 7B and the benchmark files.",
    ),
    Claim(
        "+63.83 points over vision-language models of the same size on VSP",
        "abstract", "+63.83", "–", "", None,
        "Needs checkpoints of 7B. No step runs other families: eval.run does, see EVAL.md.",
    ),
    Claim(
        "Training fits into the memory of its GPUs",
        "App. C", "2 x 80 GB", "–", "", None, "Predicted only, by train.plan.",
    ),
)  # fmt: skip
