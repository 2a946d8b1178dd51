"""Commands. To add one, write ``<name>.py`` here and add one line to ``COMMANDS``.

The function's signature is the command line, its docstring the help. Everything heavy is imported
inside the function, so that ``--help`` answers at once. Expected failures are raised as
``DistillError`` and become exit code 2.
"""

COMMANDS = {
    "run": "pipeline.commands.run:run",
    "plan": "pipeline.commands.plan:plan",
    "label": "pipeline.commands.label:label",
    "preflight": "pipeline.commands.preflight:preflight",
    "train": "pipeline.commands.train:train",
    "evaluate": "pipeline.commands.evaluate:evaluate",
    "report": "pipeline.commands.report:report",
    "certify": "pipeline.commands.certify:certify",
    "submit": "pipeline.commands.submit:submit",
    "status": "pipeline.commands.status:status",
    "ls": "pipeline.commands.ls:ls",
    "show": "pipeline.commands.show:show",
    "sql": "pipeline.commands.sql:sql",
    "inspect": "pipeline.commands.inspection:inspect",
    "view": "pipeline.commands.view:view",
    "diff": "pipeline.commands.diff:diff",
    "verify": "pipeline.commands.verify:verify",
    "repair": "pipeline.commands.repair:repair",
    "compact": "pipeline.commands.compact:compact",
    "rm": "pipeline.commands.rm:rm",
    "gc": "pipeline.commands.garbage:gc",
    "pack": "pipeline.commands.pack:pack",
    "unpack": "pipeline.commands.unpack:unpack",
    "doctor": "pipeline.commands.doctor:doctor",
    "config": "pipeline.commands.config:app",
}
