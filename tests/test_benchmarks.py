"""The benchmarks of full size run, on small models: every row of their tables is there."""

import pytest

from tests.benchmarks import full_size, gpu


@pytest.mark.filterwarnings("ignore")
def test_one_operation_of_full_size(capsys):
    full_size.main(["--small", "--only", "replace"])
    rows = table_of(capsys.readouterr().out)
    assert [row[0].split(":")[0] for row in rows].count("replace") == 2
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_of_full_size(capsys):
    full_size.main(["--small"])
    table, progress = capsys.readouterr()
    rows = table_of(table)
    starts = ["unit: ", "forward of", "generate", "replace: ", "formula: ", "erase: ", "sign: ", "splice: "]
    starts += ["a step of the paper's recipe", "encode", "train 1 cell", "train 2 cells"]
    for start in (*starts, "defaults, counted: all"):
        assert any(row[0].startswith(start) for row in rows), start
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
    assert all(name in progress for name in full_size.ROWS)


def table_of(text):
    """The cells of a printed table, row by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [line.removeprefix("| ").split(" | ") for line in lines]


@pytest.mark.filterwarnings("ignore")
def test_the_script_for_a_gpu_on_the_cpu(capsys):
    gpu.main(["--device", "cpu", "--small"])
    table = capsys.readouterr().out
    assert table.count("as it should be") == 6
    assert "WRONG" not in table
    for dtype in ("float32", "bfloat16"):
        for operation in ("forward", "generate", "train one cell", "replacement test", "logit formula"):
            assert any(
                operation in line and f"| {dtype} |" in line and "check" not in line
                for line in table.splitlines()
            )


def test_the_script_for_a_gpu_leaves_out_what_its_time_does_not_allow(capsys):
    gpu.main(["--device", "cpu", "--small", "--budget", "0"])
    table = capsys.readouterr().out
    assert "left out: the rest of the checks, after 0 s" in table
    assert "left out: the rest of the timings in torch.bfloat16" in table
