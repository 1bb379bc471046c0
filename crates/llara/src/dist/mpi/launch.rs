//! How this process was started: the variables that `mpirun` and `srun` set.

use std::env;

use crate::{Error, ErrorKind, Result};

/// Rank and number of processes, according to the launcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Rank of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// The launcher's name, for messages.
    pub launcher: &'static str,
}

/// A launcher's variables.
struct Variables {
    launcher: &'static str,
    rank: &'static str,
    size: &'static str,
}

/// The launchers. The first one whose variables are set counts: where Slurm starts the daemons of Open MPI, the
/// processes also have Slurm's variables, which are those of the daemons.
const LAUNCHERS: [Variables; 4] = [
    Variables {
        launcher: "Open MPI's mpirun",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
    },
    Variables { launcher: "a PMIx launcher", rank: "PMIX_RANK", size: "PMIX_SIZE" },
    Variables { launcher: "a PMI launcher", rank: "PMI_RANK", size: "PMI_SIZE" },
    // A batch script that starts no step has SLURM_NTASKS too, but not the number of tasks of a step.
    Variables { launcher: "srun", rank: "SLURM_PROCID", size: "SLURM_STEP_NUM_TASKS" },
];

impl Launch {
    /// The launch of this process; `None` if it was started alone.
    ///
    /// # Errors
    /// If the variables contradict each other, or another launcher was used.
    pub fn from_environment() -> Result<Option<Self>> {
        Self::from_variables(|name| env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        for Variables { launcher, rank, size } in LAUNCHERS {
            // PMIx sets the rank alone; the number of processes is then one of the next launcher's variables.
            let (Some(rank_text), Some(size_text)) = (get(rank), get(size)) else {
                if get(size).is_some() {
                    return Err(contradiction()
                        .expected(format!("{rank} and {size}"))
                        .got(format!("{size} alone")));
                }
                continue;
            };
            let number = |name: &str, text: &str| {
                text.trim().parse::<usize>().map_err(|_| {
                    contradiction()
                        .expected(format!("a number in {name}"))
                        .got(format!("{name}={text}"))
                })
            };
            let launch = Launch {
                rank: number(rank, &rank_text)?,
                size: number(size, &size_text)?,
                launcher,
            };
            if launch.rank >= launch.size {
                return Err(contradiction()
                    .expected(format!("{rank} below {size}"))
                    .got(format!("{rank}={rank_text}, {size}={size_text}")));
            }
            return Ok((launch.size > 1).then_some(launch));
        }
        // What torchrun sets.
        match get("WORLD_SIZE").filter(|_| get("RANK").is_some()) {
            Some(size) if size.trim() != "1" => {
                Err(Error::new(ErrorKind::Distributed, "started by an unsupported launcher")
                    .expected("mpirun or srun for several processes")
                    .got(format!("WORLD_SIZE={size}, as torchrun sets it"))
                    .hint("start with mpirun -n N llara finetune …"))
            }
            _ => Ok(None),
        }
    }

    /// Compares with what MPI says.
    pub(super) fn check(&self, rank: usize, size: usize) -> Result<()> {
        if (rank, size) == (self.rank, self.size) {
            return Ok(());
        }
        Err(contradiction()
            .expected(format!(
                "rank {} of {} processes, as {} says",
                self.rank, self.size, self.launcher
            ))
            .got(format!("rank {rank} of {size} from MPI"))
            .hint(
                "use the mpirun of the MPI library that is loaded (LLARA_MPI_LIBRARY selects it), or \
                 srun --mpi=pmix",
            ))
    }
}

fn contradiction() -> Error {
    Error::new(ErrorKind::Distributed, "the environment contradicts itself about the processes")
        .hint("start all processes with one mpirun or srun, and unset variables of another one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_launchers_variables_are_read() {
        let found = launch(&[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "4")]);
        let expected = Launch { rank: 2, size: 4, launcher: "Open MPI's mpirun" };
        assert_eq!(found.unwrap(), Some(expected));
        // mpirun in a Slurm allocation: srun has started one daemon per host.
        let found = launch(&[
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("PMIX_RANK", "2"),
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
        ]);
        assert_eq!(found.unwrap(), Some(expected));
        let found =
            launch(&[("PMIX_RANK", "1"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")]);
        assert_eq!(found.unwrap(), Some(Launch { rank: 1, size: 2, launcher: "srun" }));
    }

    #[test]
    fn one_process_needs_no_mpi() {
        for variables in [
            &[][..],
            &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")],
            // A batch script of Slurm, outside a step.
            &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")],
            &[("RANK", "0"), ("WORLD_SIZE", "1")],
        ] {
            assert_eq!(launch(variables).unwrap(), None, "{variables:?}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for variables in [
            &[("OMPI_COMM_WORLD_RANK", "4"), ("OMPI_COMM_WORLD_SIZE", "4")][..],
            &[("OMPI_COMM_WORLD_RANK", "-1"), ("OMPI_COMM_WORLD_SIZE", "4")],
            &[("OMPI_COMM_WORLD_SIZE", "4")],
            &[("PMI_RANK", "0"), ("PMI_SIZE", "four")],
            &[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "0")],
            &[("RANK", "1"), ("WORLD_SIZE", "2")],
        ] {
            let error = launch(variables).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Distributed, "{variables:?}");
        }
        let launch = Launch { rank: 1, size: 2, launcher: "srun" };
        assert!(launch.check(1, 2).is_ok());
        let error = launch.check(0, 1).unwrap_err().to_string();
        assert!(error.contains("rank 1 of 2") && error.contains("rank 0 of 1"), "{error}");
    }
}
