"""The claims of the paper that the ledger goes through, and why they come out as they do."""

from eval.artefacts.ledger import (
    CONTROL_LIMIT,
    FLAT,
    MARGIN,
    Claim,
    attends_to_vt,
    barely_changes,
    beats,
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
)

INTERVAL = "the 95 % interval of the paired difference lies above 0"
NOT_HERE = "needs checkpoints of 7B and the benchmark files; no run of that size was made"

CLAIMS = (
    Claim(
        "Visual thoughts in context shift the model's predictions on the same completion",
        "Table 1", "4.64 nats per token", "the interval of K_gen is above 0 in every seed",
        "table1", gap_exists,
        holds="The magnitude does not compare: this base is calibrated by cross-entropy on short "
        "texts in which few tokens depend on a picture at all.",
    ),
    Claim(
        "The shift is due to what the visual thoughts show",
        "App. F", "-", "right pictures move the base further than any wrong ones",
        "controls", right_pictures_move_most,
        holds="Right pictures move it most.",
        differs="The base believes what it sees: the VTs of another problem pull it further from "
        "the text than its own pull it towards it. K_gen measures influence, not information.",
    ),
    Claim(
        "The divergence sits in content words; function words carry next to none",
        "Fig. 6, App. F", "-", "mean KL of content words above that of function words",
        "figure6", content_words,
        holds="The language of the miniature has hardly any function words, so this says little "
        "about a 7B model.",
        differs="Only mazes have a function word (from), and the cell that follows it is chosen "
        "there: it carries what a content word would.",
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
        "not in Table 2 (69.90 by Fig. 3a)", "+4.13", INTERVAL, "table2", beats("opsd", "base"),
    ),
    Claim(
        "The student beats text-only SFT, which starts from the model before it drew",
        "Tables 2, 3", "+10.28", INTERVAL, "table2", beats("opsd", "sft"),
        differs="SFT is given the reference texts; where they can be learned by heart in the "
        "budget, it needs no visual thoughts.",
    ),
    Claim(
        "The student beats text-only SFT from the same model",
        "not run in the paper", "-", INTERVAL, "table2", beats("opsd", "sft_base"),
        differs="In the miniature every problem has one right text, and SFT is given it; OPSD sees "
        "neither texts nor answers. With perfect labels at hand SFT is as good or better; the "
        "paper leaves this baseline out since its model had been trained on these rows.",
    ),
    Claim(
        "The student beats the noise control",
        "Table 3", "+9.88", INTERVAL, "table3", beats("opsd", "noise"),
    ),
    Claim(
        "The noise control ends where text-only SFT does",
        "Table 3", "+0.40", f"within {FLAT:.0f} points of it", "table3", noise_like_sft,
        differs="SFT learns the task here, the noise control learns what noise in the context does "
        "to the base. The two have no reason to meet.",
    ),
    Claim(
        "The noise control ends below the model that it started from",
        "Table 2 with Fig. 3a", "-5.75", "the interval of the paired difference lies below 0",
        "table3", noise_below_start,
        holds="It learns to answer as the base does when it is shown noise.",
        differs="The base does no worse with noise in its context, and the student learns that.",
    ),
    Claim(
        "The student beats the model that draws",
        "Table 2", "+3.40", INTERVAL, "table2", beats("opsd", "thinkmorph"),
        holds="Points are lost in drawing: the controls show what the base makes of true pictures.",
        differs="The two are close; the interval says how close. Both are near the ceiling.",
    ),
    Claim(
        "Text-only answers are an order of magnitude faster",
        "Table 2", "14.3 times", "more than 5 times", "figure7", faster,
        holds="At this size of a picture, 50 grid points and no guidance, on this machine: the "
        "ratio depends on all of these and is not the paper's.",
    ),
    Claim(
        "Leaving the visual thoughts out barely changes accuracy",
        "Fig. 3a", "70.63 to 69.90", f"within {FLAT:.0f} points", "figure3a",
        barely_changes("systems", "base"),
        differs="This base was trained to need its pictures, so that there is something to distil.",
    ),
    Claim(
        "Noise in the place of the visual thoughts barely changes accuracy",
        "Fig. 3a", "-", f"within {FLAT:.0f} points", "figure3a",
        barely_changes("systems", "thinkmorph-noise"),
        differs="The miniature's pictures are load-bearing: without them accuracy falls.",
    ),
    Claim(
        "Text after a picture attends to it almost exclusively",
        "Fig. 3b", "10.6 % at most on the figure's own axis", "more than half of all attention",
        "figure3b", attends_to_vt("drawn"),
        differs="As on the figure's own axis, most attention goes elsewhere: to the text so far, "
        "the question and the system prompt.",
    ),
    Claim(
        "It does so whatever the picture shows, noise too",
        "Fig. 3b", "no series for noise", "more than half of all attention", "figure3b",
        attends_to_vt("noise"),
        differs="The share under noise is of the same kind; see the figure for each layer.",
    ),
    Claim(
        "The result is robust to the number of kept entries",
        "Table 6", "79.50 to 83.05", f"within {FLAT:.0f} points of the default", "table6",
        insensitive("jsd_top_k"),
        differs="With very few entries the renormalised divergence sees too little.",
    ),
    Claim(
        "The result is robust to the clip",
        "Table 6", "79.83 to 83.05", f"within {FLAT:.0f} points of the default", "table6",
        insensitive("jsd_token_clip"),
        differs="Entries above the clip have no gradient, and in texts of ten tokens these are the "
        "ones that matter: the student is pushed by the rest alone.",
    ),
    Claim(
        "Tasks whose gap closes most gain most",
        "App. I", "-", "the tasks rank alike by gap closed and by points gained", "table5",
        gap_follows_gain,
        differs="Points gained depend on where a task started, gap closed does not.",
    ),
    Claim(
        "Forward KL to many noisy teachers is smallest at the noise-free reference",
        "Theorem 1", "-", "the minimiser is the reference for all sizes of noise", "theorem",
        minimiser_is_reference,
        differs="It is the arithmetic mean of the teachers; the reference is their geometric mean, "
        "where the reverse KL is smallest.",
    ),
    Claim(
        "The student answers with half the tokens of its teacher",
        "Table 4", "201 against 452", "-", "", differs="Answers of the miniature have one length.",
    ),
    Claim(
        "74.03 % over nine benchmarks, 6 of 9 above the teacher",
        "Table 2", "74.03 %", "-", "", differs=NOT_HERE,
    ),
    Claim(
        "+63.83 points over vision-language models of the same size on VSP",
        "abstract", "+63.83", "-", "", differs=NOT_HERE,
    ),
    Claim(
        "Training fits into the memory of its GPUs",
        "App. C", "2 x 80 GB", "-", "",
        differs="Predicted only: python -m train.plan; no 7B run was made.",
    ),
)  # fmt: skip
