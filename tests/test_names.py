"""Short forms of names: each means one name, and the gateway takes it back."""

from hypothesis import example, given
from hypothesis import strategies as st

from ares.names import matching, shortened

HEX = "3f1c9a0b7d2e4c5f8a9b0c1d2e3f4a5b"
HOSTS = [f"ares-decode-{n}.ares-decode.production.svc.cluster.local:8100" for n in range(12)]


def test_what_is_short_stays() -> None:
    assert shortened(["gravity", HEX], 16) == {"gravity": "gravity", HEX: "3f1c9a0b7d2e4c.."}


def test_choices_and_hosts_keep_what_tells_them_apart() -> None:
    assert shortened([f"{HEX}-{n}" for n in range(2)], 12) == {f"{HEX}-0": "3f1c9a..5b-0", f"{HEX}-1": "3f1c9a..5b-1"}
    forms = shortened(HOSTS, 16)
    assert forms[HOSTS[1]] != forms[HOSTS[11]]
    assert max(map(len, forms.values())) <= 18


@given(st.sets(st.text("ab.-", min_size=1, max_size=24), max_size=12), st.integers(8, 16))
@example({"aaaa........bbbb", "aaaa.......bbbb"}, 8)
@example({"aaaaaaaa..", "aaaaaaaaaaaaaaaa"}, 10)
def test_a_short_form_means_its_name_alone(names: set[str], limit: int) -> None:
    forms = shortened(names, limit)
    assert forms.keys() == names
    for name, form in forms.items():
        assert matching(form, names) == [name]
        assert len(form) <= len(name)


def test_dots_are_asked_for() -> None:
    assert matching("grav", ["gravity"]) == []
    assert matching("gravi..", ["gravity", "gravel"]) == ["gravity"]
    assert matching("gra..", ["gravity", "gravel"]) == []  # too short
    assert matching("....", ["gravity"]) == []
    assert matching("gr..ty", ["gravity", "gravel"]) == ["gravity"]
    assert matching("gravit..vity", ["gravity"]) == []  # the ends do not overlap
