from ares.ray.directory import COMPLETE_S, FORGET_S, Directory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_instance_is_known_while_it_announces_itself() -> None:
    directory = Directory(clock := Clock())
    directory.announce("http://b:1")
    directory.announce("http://a:1")
    assert directory.urls()[0] == ["http://a:1", "http://b:1"]
    clock.now += FORGET_S - 1
    directory.announce("http://b:1")
    assert directory.urls()[0] == ["http://a:1", "http://b:1"]
    clock.now += 1
    assert directory.urls()[0] == ["http://b:1"]
    directory.withdraw("http://b:1")
    directory.withdraw("http://never:1")
    assert directory.urls()[0] == []


def test_a_new_one_says_that_there_may_be_others() -> None:
    directory = Directory(clock := Clock())
    directory.announce("http://a:1")
    assert directory.urls() == (["http://a:1"], False)
    clock.now += COMPLETE_S
    assert directory.urls() == (["http://a:1"], True)
