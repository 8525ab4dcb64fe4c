"""Fixtures for all tests: where the real demo is, no network, no silent skip where the shared data must be there."""
import importlib.util
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run, however slow the machine; HYPOTHESIS_PROFILE=default looks for new ones
settings.register_profile('fixed', derandomize=True, deadline=None)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'fixed'))

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get('EHR_R1_REQUIRE_SHARED') == '1'   # set by .ci/run where ../shared exists
HERE = ('localhost', '::1', '', '0.0.0.0')


def existing(path, what):
    "The path, or a skip that says what is missing."
    if not path.is_dir():
        pytest.skip(f'shared data missing: {what}')
    return path


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def shared():
    return existing(ROOT.parent/'shared', 'the folder shared/ beside the repository')


@pytest.fixture(scope='session')
def demo():
    "The MIMIC-IV demo, version 2.2."
    beside = ROOT.parent/'shared'/'data'/'mimic-iv-demo-2.2'
    return existing(Path(os.environ.get('EHR_R1_DEMO') or beside), 'the MIMIC-IV demo (or name it in EHR_R1_DEMO)')


@pytest.fixture(scope='session')
def script():
    "Loads a script of .ci/ or docs/ as a module."
    def load(path):
        spec = importlib.util.spec_from_file_location(Path(path).stem + '_script', ROOT/path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    "Where the shared data are required, a skip for want of them is a failure."
    report = yield
    if REQUIRED and report.skipped and not hasattr(report, 'wasxfail'):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if re.search('shared|demo', reason, re.I):
            report.outcome = 'failed'
            report.longrepr = f'must not be skipped here: {reason}'
    return report


def local(family, address):
    "Does the address stay on this computer?"
    if family == getattr(socket, 'AF_UNIX', None):
        return True
    host = str(address[0])
    return host in HERE or host.startswith('127.')


def guarded(original):
    "A method of sockets that refuses to leave this computer."
    def method(self, *args):
        address = args[-1]
        if not local(self.family, address):
            raise PermissionError(f'tests must not use the network: {address}')
        return original(self, *args)
    return method


def guarded_lookup(original):
    "A look-up of host names that knows this computer alone."
    def lookup(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host or ''
        if not local(None, (name,)):
            raise PermissionError(f'tests must not use the network: {host}')
        return original(host, *args, **kwargs)
    return lookup


@pytest.fixture(autouse=True, scope='session')
def no_network():
    "Any connection that leaves this computer is an error."
    with pytest.MonkeyPatch.context() as patch:
        for name in ('connect', 'connect_ex', 'sendto'):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, 'getaddrinfo', guarded_lookup(socket.getaddrinfo))
        yield
