//! Several databases in one run: looked at all together, then moved one after the other.
//!
//! Invariant: nothing is moved before preflight has found nothing red for any of them; what does not end well ends the
//! series, and whoever ran it is told which have moved and which have not. Each has its own run, journal and report.

use crate::commands::cutover::Cutover;
use crate::commands::{Context, interrupt, preflight};
use crate::plan::Goal;
use crate::printer::Exit;

/// Moves them, or rehearses it; the exit code is that of the one that ended the series.
pub async fn run(how: &Cutover, goal: Goal, contexts: Vec<Context>) -> anyhow::Result<Exit> {
    let Some(printer) = contexts.first().map(|context| context.printer) else { return Ok(Exit::Usage) };
    let interrupt = interrupt(printer)?;
    if contexts.len() > 1 {
        let exit = preflights(&contexts, None).await?;
        if exit != Exit::Done {
            printer.talk("nothing was moved: every database has to be ready first");
            return Ok(exit);
        }
    }
    let names: Vec<String> = contexts.iter().map(|context| context.config.database.clone()).collect();
    for (at, context) in contexts.into_iter().enumerate() {
        if names.len() > 1 {
            printer.talk(format_args!("database {} of {}: {}", at + 1, names.len(), names[at]));
        }
        let exit = how.run(goal, context, interrupt.clone()).await?;
        let (moved, rest) = (&names[..at + usize::from(exit == Exit::Done)], &names[at + 1..]);
        let interrupted = exit == Exit::Done && !rest.is_empty() && *interrupt.borrow();
        if (exit != Exit::Done || interrupted) && names.len() > 1 {
            let listed = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let (moved, rest) = (listed(moved), listed(rest));
            printer.talk(format_args!("the series ends here; ended well: {moved}; not begun: {rest}"));
        }
        if interrupted {
            return Ok(Exit::Refused);
        }
        if exit != Exit::Done {
            return Ok(exit);
        }
    }
    Ok(Exit::Done)
}

/// Preflight of each, after which a person types `then`; the first answer that is not [`Exit::Done`], after all have been looked at.
pub async fn preflights(contexts: &[Context], then: Option<&str>) -> anyhow::Result<Exit> {
    let mut worst = Exit::Done;
    for context in contexts {
        if contexts.len() > 1 {
            context.printer.talk(format_args!("{}:", context.config.path.display()));
        }
        let exit = preflight::run(context, then).await?;
        if worst == Exit::Done {
            worst = exit;
        }
    }
    Ok(worst)
}
