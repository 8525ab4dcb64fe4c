"The command: what it says before, while and after, and that it says it at once."
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from ehr_r1 import command, pipeline
from ehr_r1.command import main
from ehr_r1.profiles import Profile

AT_ONCE = """
import sys
from ehr_r1.command import main
main({words})
print(sorted({{'polars', 'torch', 'pandas', 'matplotlib', 'transformers'}} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize('words', [['--version'], ['--help'], ['help', 'adapt'], ['help', 'reproduce'], ['nonsense']])
def test_questions_load_nothing_that_takes_time(words):
    asked = [sys.executable, '-c', AT_ONCE.format(words=words)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == '[]'
    assert done.stdout or done.stderr.count('\n') > 1


def test_every_stage_is_told():
    assert list(command.STAGE_LINES) == list(pipeline.STAGES)
    assert command.ALONE == pipeline.APART


def test_every_field_of_a_profile_is_told_by_some_stage(capsys):
    for stage in command.STAGE_LINES:
        main(['help', stage])
    said = capsys.readouterr().out
    lacking = [field.name for field in fields(Profile) if f'  {field.name}=' not in said]
    assert not lacking


def test_help_shows_the_values_of_the_profile_that_is_named(capsys):
    main(['help', 'adapt', 'profile=study'])
    assert 'adapt_steps=4800' in capsys.readouterr().out


@pytest.mark.parametrize('words, said', [
    (['adapt', 'model=Qwen3-8B'], 'a name on the hub has an owner'),
    (['reproduce', 'model=./models/mine'], 'there is no such folder or file'),
    (['ehrmind', 'ehrmind_model=x.gguf'], 'there is no such folder or file'),
    (['evaluate', 'model=llama'], 'no folder that is here'),
    (['reproduce', 'data=nowhere'], 'data=nowhere: there is no such folder'),
    (['reproduce', 'codes=nowhere'], 'codes=nowhere: there is no such folder'),
    (['graphs', 'knowledge=nowhere'], 'knowledge=nowhere: there is no such folder'),
    (['reproduce', 'teacher=server'], 'EHR_R1_TEACHER_MODEL is not set'),
    (['reproduce', 'protcol=official'], 'did you mean protocol?'),
    (['reproduce', 'ablations=short'], 'must be among variants'),
])
def test_what_is_known_to_be_wrong_is_said_before_the_first_stage(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    monkeypatch.delenv('EHR_R1_TEACHER_MODEL', raising=False)
    assert main([*words, 'run=x']) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path/'runs').exists()


def test_a_command_says_what_it_will_do_and_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('EHR_R1_HOME', str(tmp_path))
    assert main(['hospital', 'trajectories', 'profile=smoke', 'patients=12', 'workers=1', 'run=x']) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith('smoke: 2 stages from a synthetic hospital of 12 patients, seed 42, into ')
    assert 'took' not in first  # that is known of whole profiles as they stand
    numbered = [line.partition(':')[0] for line in others if ' of 2, ' in line]
    assert numbered == ['1 of 2, hospital', '2 of 2, trajectories']


def test_how_long_a_whole_run_takes_is_said():
    r = pipeline.Reproduction('demo')
    assert 'took 22 minutes' in command.said_before(r, list(pipeline.ORDER))
    assert 'took' not in command.said_before(r, ['adapt'])


def test_the_end_shows_six_rows_and_the_page_to_open(tmp_path):
    assert command.said_after(tmp_path) == ''
    row = 'EHR-R1,figure 1c,a quantity,0.6,0.5 (0.4 to 0.6),runs on open data,MIMIC-IV,06_stages,t'
    columns = 'paper,item,quantity,published,ours,status,needs,report,table'
    (tmp_path/'ledger.csv').write_text('\n'.join([columns, *[row]*9]) + '\n')
    *rows, last = command.said_after(tmp_path).splitlines()
    assert len(rows) == 6
    assert '0.5 (0.4 to 0.6)' in rows[0]
    assert '00_ledger.ipynb' in last


def make(*words, **environment):
    return subprocess.run(['make', '--dry-run', *words], capture_output=True, text=True, env=os.environ | environment)


def test_make_refuses_a_setting_that_there_is_not():
    done = make('samples', 'PROTCOL=official')
    assert done.returncode
    assert 'no setting PROTCOL; there are PROFILE DATA' in done.stderr


def test_make_takes_no_setting_from_the_environment():
    assert 'official' not in make('samples', PROTOCOL='official').stdout
    assert "protocol='official'" in make('samples', 'PROTOCOL=official').stdout
