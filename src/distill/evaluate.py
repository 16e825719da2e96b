"""`python -m distill.evaluate run=...`: judge a finished run again, and rewrite its evaluation and report."""

from omegaconf import DictConfig, OmegaConf

from distill.compose import run_at
from distill.errors import command


@command("evaluate")
def main(cfg: DictConfig) -> None:
    from distill import build
    from distill.report import write_report
    from distill.sampling import sampler_of
    from distill.students.card import write_card

    folder = run_at(cfg.run)
    student = build.student_of(cfg.run)
    teacher = build.make(OmegaConf.load(folder / "config.yaml").teacher)
    print(build.table(build.make(cfg.metrics)(student, teacher, folder, sampler_of(student.pipeline))))
    if (folder / "student").is_dir():
        write_card(folder / "student", folder, teacher.folder)
    print(f"wrote {folder / 'evaluation.json'} and {write_report(folder)}")


if __name__ == "__main__":
    main()
