"""The check before a launch: what it lets through, and the one line it says otherwise."""

import pytest

from tests.training import opsd_argv, sft_argv
from train import check


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["opsd", "--teacher_mode", "self"], 0, ""),
        (["sft"], 0, ""),
        (["sft", "--teacher_mode", "self"], 2, "unrecognized arguments: --teacher_mode self"),
        (["opsd", "--model_path", "models/nowhere"], 2, "models/nowhere is not a folder"),
        (["opsd", "--weights", "ema"], 2, "has no ema.safetensors"),
        (["sft", "--dataset_config_file", "nowhere.yaml"], 2, "nowhere.yaml: no such mixture"),
        (["opsd", "--data_root", "nowhere"], 2, "nowhere"),
        (["opsd", "--resume", "latest"], 2, "--resume latest: nothing to resume from"),
        (["rl"], 2, "invalid choice: 'rl'"),
        ([], 2, "required: trainer"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(capsys, monkeypatch, tmp_path, argv, code, said):
    usual = {"opsd": opsd_argv, "sft": sft_argv}
    words = [*argv[:1], *(usual[argv[0]](tmp_path) if argv and argv[0] in usual else []), *argv[1:]]
    monkeypatch.setattr("sys.argv", ["check.py", *words])
    try:
        check.main()
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    assert status == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert bool(err) == bool(code)
    assert list(tmp_path.iterdir()) == []
