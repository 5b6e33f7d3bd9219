import json

from llmc_cli.training.logs import RunLog


def write(folder, start_at, steps):
    log = RunLog(folder, start_at)
    for step in steps:
        if step % 2 == 0:
            log.validation(step, 2.5, {"step": step, "val_loss": 2.5})
        log.update(step, 3.0, 1.25, 1e-4, {"step": step + 1, "loss": 3.0})


def test_lines_of_both_logs(tmp_path):
    write(tmp_path, None, [0])
    assert (tmp_path / "main.log").read_text() == "s:0 tel:2.5000\ns:0 trl:3.0000 lr:0.000100 norm:1.25\n"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"schema": 1, "step": 0, "val_loss": 2.5}
    assert json.loads(lines[1]) == {"schema": 1, "step": 1, "loss": 3.0}


def test_fresh_run_clears_the_logs(tmp_path):
    write(tmp_path, None, range(4))
    write(tmp_path, None, [0])
    assert len((tmp_path / "main.log").read_text().splitlines()) == 2


def test_resumed_run_truncates_the_logs(tmp_path):
    write(tmp_path, None, range(7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # truncated by a crash
    write(tmp_path, 4, range(4, 6))
    assert [line.split()[0] for line in (tmp_path / "main.log").read_text().splitlines() if "trl" in line] == [
        f"s:{step}" for step in range(6)
    ]
    assert (tmp_path / "main.log").read_text().count("s:4 tel") == 1
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in events if "val_loss" in event] == [0, 2, 4]


def test_no_folder_no_logs(tmp_path):
    write(None, None, range(2))
    assert list(tmp_path.iterdir()) == []
