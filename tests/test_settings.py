"""Settings: where each comes from, what is refused, and that no password is shown."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import asyncstore
from asyncstore import ConfigurationError, Settings
from asyncstore.settings import embedded_directory_of, mask, seeds_of, server_url_of


def write(text: str, path: str = "asyncstore.toml") -> Path:
    Path(path).write_text(text)
    return Path(path)


SEED_FILE = """
[storage]
backend = "redis"

[storage.redis]
url = "redis://localhost:6379"
# For cluster mode
# urls = ["redis://node1:6379", "redis://node2:6379"]
"""


class TestSources:
    def test_nothing_said_is_an_embedded_server_in_this_directory(self) -> None:
        settings = Settings.resolve({}, {})
        assert settings.backend == "embedded"
        assert settings.where() == f"embedded://{Path.cwd()}/.asyncstore"
        assert embedded_directory_of(settings) == Path.cwd() / ".asyncstore"

    def test_the_seeds_file(self) -> None:
        settings = Settings.from_toml(write(SEED_FILE))
        assert (settings.backend, settings.url) == ("redis", "redis://localhost:6379")
        assert Settings.resolve({}, {}) == settings

    def test_the_seeds_variables(self) -> None:
        environ = {"STORAGE_BACKEND": "redis", "REDIS_URL": "redis://h:1"}
        settings = Settings.from_env(environ)
        assert (settings.backend, settings.url) == ("redis", "redis://h:1")
        assert Settings.from_env({"REDIS_URL": "redis://h:1"}) == settings

    def test_arguments_over_environment_over_file(self) -> None:
        write(
            '[storage]\nbackend = "redis"\nkey_prefix = "file:"\ntimeout = 3\n'
            'max_event_bytes = 7\n[storage.redis]\nurl = "redis://file"'
        )
        environ = {
            "REDIS_URL": "redis://environment",
            "ASYNCSTORE_KEY_PREFIX": "environment:",
            "ASYNCSTORE_TIMEOUT": "2.5",
            "ASYNCSTORE_ALLOW_EVICTION": "true",
        }
        settings = Settings.resolve({"url": "redis://argument", "key_prefix": "a:"}, environ)
        assert (settings.url, settings.key_prefix) == ("redis://argument", "a:")
        assert (settings.timeout, settings.allow_eviction) == (2.5, True)
        assert settings.max_event_bytes == 7
        assert Settings.resolve({}, environ).url == "redis://environment"
        assert Settings.resolve({}, {}).url == "redis://file"

    def test_where_the_store_is_is_settled_as_one_thing(self) -> None:
        write('[storage]\nbackend = "embedded"\n[storage.embedded]\npath = "/data"')
        settings = Settings.resolve({}, {"REDIS_URL": "redis://h"})
        assert (settings.backend, settings.path) == ("redis", None)
        assert embedded_directory_of(Settings.resolve({}, {})) == Path("/data")
        write(SEED_FILE)
        assert Settings.resolve({}, {"STORAGE_BACKEND": "embedded"}).backend == "embedded"
        assert embedded_directory_of(Settings.resolve({"url": "embedded://"}, {})) is None
        both = {"STORAGE_BACKEND": "embedded", "REDIS_URL": "redis://h", "ASYNCSTORE_PATH": "/p"}
        assert embedded_directory_of(Settings.from_env(both)) == Path("/p")
        both["STORAGE_BACKEND"] = "redis"
        assert Settings.from_env(both).url == "redis://h"
        write(
            '[storage]\nbackend = "redis"\n[storage.redis]\nurl = "redis://h"\n'
            '[storage.embedded]\npath = "/data"'
        )
        assert Settings.resolve({}, {}).url == "redis://h"
        embedded = Settings.resolve({}, {"STORAGE_BACKEND": "embedded"})
        assert embedded_directory_of(embedded) == Path("/data")
        assert Settings.from_env({"ASYNCSTORE_URLS": "redis://a, redis://b:2"}).urls == (
            "redis://a",
            "redis://b:2",
        )

    def test_the_variable_that_names_the_file(self, tmp_path: Path) -> None:
        path = write(SEED_FILE, str(tmp_path / "other.toml"))
        assert Settings.resolve({}, {"ASYNCSTORE_CONFIG": str(path)}).backend == "redis"

    def test_what_tests_and_kubernetes_set_is_no_setting(self) -> None:
        environ = {
            "ASYNCSTORE_TEST_URL": "redis://h",
            "ASYNCSTORE_SERVICE_HOST": "10.0.0.1",
            "ASYNCSTORE_SERVICE_PORT_HTTP": "80",
            "ASYNCSTORE_PORT": "tcp://10.0.0.1:80",
            "ASYNCSTORE_PORT_80_TCP_ADDR": "10.0.0.1",
            "ASYNCSTORE_SERVICE_SERVICE_HOST": "10.0.0.1",
            "ASYNCSTORE_SHOP_SERVICE_HOST": "10.0.0.2",
            "ASYNCSTORE_SHOP_SERVICE_PORT": "80",
            "ASYNCSTORE_SHOP_PORT": "tcp://10.0.0.2:80",
            "ASYNCSTORE_SHOP_PORT_80_TCP": "tcp://10.0.0.1:80",
            "REDIS_URL": "",
        }
        assert Settings.from_env(environ) == Settings()

    @pytest.mark.parametrize(
        "settings",
        [
            Settings(),
            Settings(url="rediss://u:p%40ss@h:1/2", key_prefix="a:", timeout=1.5),
            Settings(urls=["redis://a", "redis://b"], allow_eviction=True),
            Settings(url="redis://u@h", password='p@s"s/ #%'),
            Settings(path=Path("/data"), max_event_bytes=5, max_in_flight=3),
            Settings(url="embedded:///data with space"),
            Settings(backend="redis", url="unix:///run/redis.sock", max_append_events=7),
        ],
        ids=repr,
    )
    def test_to_toml_and_back(self, settings: Settings, tmp_path: Path) -> None:
        path = tmp_path / "asyncstore.toml"
        text = settings.to_toml(path)
        path.chmod(0o644)
        settings.to_toml(path)
        assert path.read_text() == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        back = Settings.from_toml(path)
        assert back.where() == settings.where()
        assert back.to_toml() == text


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ('[storage]\nbackend = "postgres"', "storage.backend"),
            ('[storage]\nbackend = "redis"', "storage.redis.url"),
            ("[storage]\nbackend = 5", "storage.backend"),
            ('[storage]\nurl = "redis://h"', "storage.url"),
            ('[storage.redis]\nuri = "redis://h"', "storage.redis.uri"),
            ("[storag]\nx = 1", "storag.x"),
            ("key_prefix = 'x'", "key_prefix"),
            ('[storage.redis]\nurl = "localhost:6379"', "storage.redis.url"),
            ('[storage.redis]\nurl = "http://localhost"', "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://"', "storage.redis.url"),
            ('[storage.redis]\nurl = ""', "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://h:port"', "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://h:99999"', "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://[::1"', "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://h/x"', "storage.redis.url"),
            ('[storage.redis]\nurl = "unix://"', "storage.redis.url"),
            ("[storage.redis]\nurl = 6379", "storage.redis.url"),
            ('[storage.redis]\nurl = "redis://a"\nurls = ["redis://b"]', "storage.redis.urls"),
            ('[storage.redis]\nurls = "redis://b"', "storage.redis.urls"),
            ('[storage.redis]\nurls = ["redis://b", "nonsense"]', "storage.redis.urls"),
            ('[storage.redis]\nurls = ["embedded://"]', "storage.redis.urls"),
            ("[storage.embedded]\npath = 5", "storage.embedded.path"),
            ('[storage]\nkey_prefix = "a{b}"', "storage.key_prefix"),
            ("[storage]\nkey_prefix = 5", "storage.key_prefix"),
            ("[storage]\ntimeout = 0", "storage.timeout"),
            ("[storage]\ntimeout = nan", "storage.timeout"),
            ('[storage]\ntimeout = "1"', "storage.timeout"),
            ("[storage]\nmax_event_bytes = 1.5", "storage.max_event_bytes"),
            ("[storage]\nmax_event_bytes = 0", "storage.max_event_bytes"),
            ("[storage]\nmax_append_events = 1000000", "storage.max_append_events"),
            ("[storage]\nmax_in_flight = true", "storage.max_in_flight"),
            ("[storage]\nallow_eviction = 1", "storage.allow_eviction"),
            ("[storage\n", "the file"),
        ],
    )
    def test_a_file(self, text: str, key: str) -> None:
        path = write(text)
        for read in (lambda: Settings.from_toml(path), asyncstore.open):
            with pytest.raises(ConfigurationError) as caught:
                read()
            assert caught.value.key == key
            assert caught.value.source == "asyncstore.toml"
            assert str(caught.value).startswith(f"{key} in asyncstore.toml: ")

    @pytest.mark.parametrize(
        ("environ", "key"),
        [
            ({"ASYNCSTORE_KEYPREFIX": "a"}, "ASYNCSTORE_KEYPREFIX"),
            ({"ASYNCSTORE_TIMEOUT": "soon"}, "ASYNCSTORE_TIMEOUT"),
            ({"ASYNCSTORE_PORT": "6379"}, "ASYNCSTORE_PORT"),
            ({"ASYNCSTORE_SERVICE_HOST": "h", "ASYNCSTORE_HOST": "h"}, "ASYNCSTORE_HOST"),
            ({"ASYNCSTORE_ALLOW_EVICTION": "perhaps"}, "ASYNCSTORE_ALLOW_EVICTION"),
            ({"STORAGE_BACKEND": "postgres"}, "STORAGE_BACKEND"),
            ({"STORAGE_BACKEND": "redis"}, "REDIS_URL"),
            ({"REDIS_URL": "nonsense"}, "REDIS_URL"),
            ({"REDIS_URL": "redis://a", "ASYNCSTORE_URLS": "redis://b"}, "ASYNCSTORE_URLS"),
            ({"REDIS_URL": "redis://:s3cret@h", "ASYNCSTORE_PASSWORD": "x"}, "ASYNCSTORE_PASSWORD"),
            ({"ASYNCSTORE_PASSWORD": "x"}, "ASYNCSTORE_PASSWORD"),
            ({"REDIS_URL": "redis://h", "ASYNCSTORE_PASSWORD": "x\n"}, "ASYNCSTORE_PASSWORD"),
        ],
    )
    def test_the_environment(self, environ: dict[str, str], key: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Settings.from_env(environ)
        assert (caught.value.key, caught.value.source) == (key, "the environment")

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"url": "redis://a", "urls": ["redis://b"]}, "urls"),
            ({"url": "redis://a", "path": "/p"}, "path"),
            ({"urls": ["nonsense"]}, "urls"),
            ({"prefix": "x"}, "prefix"),
            ({"backend": "redis"}, "url"),
            ({"url": "embedded://relative/path"}, "url"),
            ({"url": "embedded:/path"}, "url"),
            ({"url": "embedded:///path?x=1"}, "url"),
            ({"path": ""}, "path"),
            ({"url": b"redis://h"}, "url"),
            ({"url": "redis://h?protocol=4"}, "url"),
            ({"url": "redis://h?decode_responses=True"}, "url"),
            ({"url": "redis://h?db=first"}, "url"),
            ({"url": "redis://h\n"}, "url"),
            ({"url": "embedded:///"}, "url"),
            ({"url": "embedded:///a%00b"}, "url"),
            ({"backend": "embedded", "url": "redis://h"}, "backend"),
            ({"backend": "redis", "url": "redis://h", "path": "/p"}, "path"),
            ({"max_append_bytes": 0}, "max_append_bytes"),
            ({"url": "redis://h", "password": ""}, "password"),
            ({"url": "redis://h", "password": b"x"}, "password"),
            ({"url": "redis://h?password=x", "password": "x"}, "password"),
            ({"urls": ["redis://a", "redis://u:x@b"], "password": "x"}, "password"),
            ({"url": "embedded://", "password": "x"}, "password"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], key: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            asyncstore.open(**options)
        assert (caught.value.key, caught.value.source) == (key, "the arguments")

    @pytest.mark.parametrize("url", ["redis://:s3cret@a:1,redis://b:2", "redis://a, valkeys://b"])
    def test_several_urls_in_the_place_of_one(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="ASYNCSTORE_URLS") as caught:
            Settings.from_env({"REDIS_URL": url})
        assert caught.value.key == "REDIS_URL"
        assert "s3cret" not in str(caught.value)

    def test_a_place_given_twice(self) -> None:
        with pytest.raises(ConfigurationError, match="twice"):
            asyncstore.open("redis://a", url="redis://b")

    def test_an_empty_list_of_urls_says_nothing(self) -> None:
        assert Settings.resolve({"urls": []}, {"REDIS_URL": "redis://h"}).url == "redis://h"

    def test_a_password_in_the_wrong_place(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Settings(backend="redis://u:s3cret@h")
        assert "s3cret" not in str(caught.value)

    def test_settings_and_options_together(self) -> None:
        with pytest.raises(ConfigurationError, match="not both"):
            asyncstore.open(Settings(), key_prefix="x")

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(ConfigurationError, match=r"missing\.toml"):
            Settings.from_toml("missing.toml")
        with pytest.raises(ConfigurationError, match=r"missing\.toml"):
            Settings.resolve({}, {"ASYNCSTORE_CONFIG": "missing.toml"})

    @pytest.mark.parametrize(
        ("url", "seeds"),
        [
            ("redis://h?cluster=true", ["redis://h"]),
            ("valkeys://u:p@h:1?cluster=true&protocol=3", ["rediss://u:p@h:1?protocol=3"]),
            ("redis://h?protocol=3&cluster=true", ["redis://h?protocol=3"]),
            ("redis://h?cluster=false", []),
            ("redis://h", []),
        ],
    )
    def test_of_a_cluster_by_one_url(self, url: str, seeds: list[str]) -> None:
        settings = Settings(url=url)
        assert seeds_of(settings) == seeds
        assert "cluster" not in server_url_of(settings)

    @pytest.mark.parametrize("value", ["", "1", "TRUE", "no"])
    def test_of_a_cluster_says_true_or_false(self, value: str) -> None:
        with pytest.raises(ConfigurationError, match="cluster wants true or false"):
            Settings(url=f"redis://h?cluster={value}")


class TestPasswords:
    def test_apart_from_the_url(self) -> None:
        secret = "p@ss:/w#rd?%2F+="
        quoted = "p%40ss%3A%2Fw%23rd%3F%252F%2B%3D"
        for url, dialled in (
            ("redis://h:1/2", f"redis://:{quoted}@h:1/2"),
            ("valkeys://u%40x@h?protocol=3", f"rediss://u%40x:{quoted}@h?protocol=3"),
            ("unix:///run/a@b.sock", f"unix://:{quoted}@/run/a@b.sock"),
        ):
            settings = Settings(url=url, password=secret)
            assert server_url_of(settings) == dialled
            assert secret not in f"{settings} {settings.where()} {asyncstore.open(settings)!r}"
        both = Settings(urls=["redis://a", "redis://u@b:1"], password="x")
        assert seeds_of(both) == ["redis://:x@a", "redis://u:x@b:1"]
        assert seeds_of(Settings(url="redis://a?cluster=true", password="x")) == ["redis://:x@a"]

    def test_goes_only_where_its_own_source_or_one_after_it_says(self) -> None:
        write('[storage.redis]\nurl = "redis://file"\npassword = "of-file"')
        of_environment = {"ASYNCSTORE_PASSWORD": "of-environment"}
        assert Settings.resolve({}, {}).password == "of-file"
        assert Settings.resolve({}, of_environment).password == "of-environment"
        assert Settings.resolve({}, {"REDIS_URL": "redis://h"}).password is None
        assert Settings.resolve({"url": "redis://h"}, of_environment).password is None
        assert Settings.resolve({"backend": "redis", "url": "redis://h"}, {}).password is None
        assert Settings.resolve({"backend": "embedded"}, of_environment).password is None

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://u:s3cret@h:1/0", "redis://u:***@h:1/0"),
            ("redis://:s3cret@h", "redis://:***@h"),
            ("redis://s3cret@h", "redis://***@h"),
            ("redis://u:a@s3cret@h", "redis://u:***@h"),
            ("redis://u:a/s3cret?#@h", "redis://u:***@h"),
            ("redis://h?password=s3cret&db=1", "redis://h?password=***&db=1"),
            ("rediss://h?ssl_password=s3cret", "rediss://h?ssl_password=***"),
            ("redis://h", "redis://h"),
            ("u:s3cret@h", "u:***@h"),
            ("redis://u:a,s3cret@h", "redis://u:***@h"),
            ("redis://u:a://s3cret@h", "redis://u:***@h"),
            ("redis://u:s3cret", "redis://u:***"),
            ("redis://:s3cret", "redis://:***"),
            ("redis://h?p%61ssword=s3cret", "redis://h?p%61ssword=***"),
            ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
            ("redis://h:6379?db=1", "redis://h:6379?db=1"),
            ("unix:///run/a@b:c.sock", "unix:///run/a@b:c.sock"),
            ("embedded:///x@y,z:0", "embedded:///x@y,z:0"),
        ],
    )
    def test_are_masked(self, url: str, shown: str) -> None:
        assert mask(url) == shown

    @given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=20))
    def test_are_masked_whatever_they_look_like(self, password: str) -> None:
        secret = f"{password}~"
        urls = [
            f"redis://user:{secret}@host:1",
            f"redis://:{secret}@host",
            f"user:{secret}@host:port",
        ]
        if "@" not in secret:  # what follows it would be taken for the host
            urls.append(f"redis://user:{secret}")
        for url in urls:
            assert secret not in shown_of(url)


def shown_of(url: str) -> str:
    """Everything that is shown of a URL, whether it can be used or not."""
    try:
        settings = Settings(url=url)
    except ConfigurationError as error:
        return f"{error} {error!r} {error.__context__!r} {error.__cause__!r}"
    cluster = Settings(urls=[url]) if settings.backend == "redis" else ""
    return f"{settings} {settings.where()} {asyncstore.open(settings)!r} {cluster}"
