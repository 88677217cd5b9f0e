import flipproof.doctor as doctor_module
from flipproof.doctor import doctor


def test_this_machine_draws_what_the_definition_says():
    report, healthy = doctor()
    assert healthy
    assert "self-test of the draw on cpu: passed" in report
    assert "reference (NumPy)" in report


def test_a_machine_that_draws_otherwise_is_found_out(monkeypatch):
    monkeypatch.setattr(doctor_module, "_KNOWN_DRAW", "0" * 16)
    report, healthy = doctor()
    assert not healthy
    assert "FAILED" in report
