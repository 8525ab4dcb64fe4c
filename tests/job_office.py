"A server for tests that takes questions as jobs and repeats them."
import json
import re

from faulty_proxy import JSON


class Office:
    "A server of jobs: `answers` says how many questions of a job it answers, `looks` at which look a job is done."
    def __init__(self, answers=None, looks=1, status='completed'):
        self.answers, self.looks, self.status = answers, looks, status
        self.files, self.seen = {}, {}

    @property
    def jobs(self):
        return [name for name in self.files if name.startswith('questions')]

    def __call__(self, method, path, body, headers):
        if method == 'POST' and path.endswith('/files'):
            name = f'questions-{len(self.jobs)}'
            self.files[name] = [json.loads(line) for line in body.decode().split('\n') if line.startswith('{"custom')]
            return self.says(id=name)
        if method == 'POST':
            return self.says(id=json.loads(body)['input_file_id'], status='validating')
        if found := re.search(r'/files/(.*)/content', path):
            return 200, JSON, '\n'.join(map(json.dumps, self.files[found[1]]))
        return self.look(path.rpartition('/')[2])

    def says(self, **content):
        return 200, JSON, json.dumps(content)

    def look(self, job):
        self.seen[job] = self.seen.get(job, 0) + 1
        if self.seen[job] < self.looks:
            return self.says(id=job, status='in_progress')
        asked = self.files[job]
        n = len(asked) if self.answers is None else self.answers
        self.files[f'answers-{job}'] = [self.answered(line) for line in asked[:n]][::-1]
        return self.says(id=job, status=self.status, output_file_id=f'answers-{job}')

    def answered(self, line):
        text = line['body']['messages'][-1]['content']
        choice = dict(message=dict(role='assistant', content=text), finish_reason='stop')
        body = dict(model='parrot', choices=[choice], usage=dict(prompt_tokens=3, completion_tokens=2))
        return dict(custom_id=line['custom_id'], response=dict(status_code=200, body=body))
