import pytest

from espnet.utils.recovery.callbacks import COLUMNS, read_metrics

HEADER = ",".join(COLUMNS) + "\n"
ROWS = [",".join(str(10 * epoch + place) for place in range(len(COLUMNS))) for epoch in range(2)]


def test_rows_come_back(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == []
    path.write_text(HEADER + "\n".join(ROWS) + "\n")
    expected = [dict(zip(COLUMNS, row.split(","), strict=True)) for row in ROWS]
    assert read_metrics(path) == expected


@pytest.mark.parametrize("kept", range(len(ROWS[1])))
def test_a_half_written_row_does_not_count(tmp_path, kept):
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + ROWS[0] + "\n" + ROWS[1][:kept])
    assert read_metrics(path) == [dict(zip(COLUMNS, ROWS[0].split(","), strict=True))]
