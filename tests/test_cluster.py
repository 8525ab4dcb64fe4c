"Work on shards through Dask: the same bytes, and a worker that dies loses nothing."
import os
import signal
import threading
import time

import pytest

from ehr_r1.cluster import check_cluster, cluster_of, shards_on
from ehr_r1.command import main
from ehr_r1.pipeline import Reproduction, run_stages

STAGES = ['hospital', 'trajectories', 'index', 'samples', 'knowledge', 'graphs', 'chains']
SMALL = dict(patients=40, shard_patients=10, chains_per_task=4)
AS_IT_WAS = ('measured.json', 'manifest.json', '.fingerprints.json', 'profile.json')


def bytes_of(run):
    "What the files of a run hold, times and places aside."
    files = [file for file in sorted(run.folder.rglob('*')) if file.is_file() and file.name not in AS_IT_WAS]
    return {str(file.relative_to(run.folder)): file.read_bytes() for file in files if file.suffix != '.lock'}


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A run made by processes of this machine."
    r = Reproduction('smoke', home=tmp_path_factory.mktemp('here'), run='r', **SMALL)
    run_stages(r, STAGES)
    return bytes_of(r.run)


def kill_one(client, folder, killed):
    "Kill a worker once a shard stands in a folder."
    workers = list(client.run(os.getpid).values())
    deadline = time.time() + 60
    while time.time() < deadline and not list(folder.glob('*.partial/shard-*')):
        time.sleep(.005)
    os.kill(workers[0], signal.SIGKILL)
    killed.append(list(folder.glob('*.partial')))


def test_a_cluster_makes_the_same_bytes_and_outlives_a_worker(here, tmp_path):
    r = Reproduction('smoke', home=tmp_path, run='r', cluster='local:2', **SMALL)
    killed = []
    with cluster_of('local:2') as client:
        killer = threading.Thread(target=kill_one, args=(client, r.run.folder, killed))
        killer.start()
        run_stages(r, STAGES, client)
        killer.join()
    assert killed and killed[0], 'a stage was at work when a worker died'
    assert bytes_of(r.run) == here


def test_joblib_is_as_before_without_a_cluster():
    from joblib import Parallel
    with shards_on(None):
        assert 'Dask' not in type(Parallel(2)._backend).__name__


NO_CLUSTERS = ['spark', 'local:', 'local:x', '10.0.0.1:8786', 'tcp://', 'http://a:1', 'tcp://a b:1']

@pytest.mark.parametrize('where', NO_CLUSTERS)
def test_what_is_no_cluster_is_refused_before_the_first_stage(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    assert main(['hospital', 'profile=smoke', f'cluster={where}']) == 1
    assert 'local:4 for workers here' in capsys.readouterr().err
    assert not (tmp_path/'runs').exists()


@pytest.mark.parametrize('where', ['', 'local:12', 'tcp://10.0.0.1:8786', 'tls://scheduler.example.org:8786'])
def test_clusters_that_are_known(where):
    check_cluster(where)


def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    monkeypatch.setattr('ehr_r1.cluster.ANSWERS_WITHIN', 2)
    assert main(['hospital', 'profile=smoke', 'patients=10', 'cluster=tcp://127.0.0.1:9']) == 1
    assert 'no Dask scheduler answers there' in capsys.readouterr().err


def test_a_cluster_is_in_no_name_and_in_no_key():
    assert Reproduction('smoke', cluster='local:4').run.name == 'smoke'
