"""The benchmarks of full size run, on small models: every row of their tables is there."""

import pytest

from tests.benchmarks import full_size, gpu


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_full_size(capsys):
    full_size.main(["--small"])
    table, progress = capsys.readouterr()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    operations = [row[0].removeprefix("| ") for row in rows]
    for start in (
        *("unit: ", "forward of", "generate", "replace: ", "formula: ", "erase: ", "sign: ", "splice: "),
        *(
            "a step of the paper's recipe",
            "encode",
            "train 1 cell",
            "train 2 cells",
            "defaults, counted: all",
        ),
    ):
        assert any(operation.startswith(start) for operation in operations), start
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
    assert all(name in progress for name in full_size.ROWS)


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
