//! What `config/` offers for Kubernetes and systemd: it parses, the programs take the configuration in it, and the two agree.
//!
//! Invariant: reads files only; no cluster and no service manager is touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use pgcutover::config::Config;
use proxyctl::config::members::Point;
use saphyr::{LoadableYamlNode, Yaml};
use tempfile::TempDir;

/// Where each manifest has the container that matters.
const MANIFESTS: [(&str, &str, &str); 2] =
    [("sidecar.yaml", "Deployment", "initContainers"), ("service.yaml", "StatefulSet", "containers")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The node at a path of keys and indices.
fn at<'a, 'b>(node: &'a Yaml<'b>, path: &str) -> &'a Yaml<'b> {
    path.split('.').fold(node, |node, key| {
        let next = match key.parse::<usize>() {
            Ok(index) => node.as_sequence_get(index),
            Err(_) => node.as_mapping_get(key),
        };
        next.unwrap_or_else(|| panic!("no {key} of {path}"))
    })
}

fn text(node: &Yaml<'_>, path: &str) -> String {
    at(node, path).as_str().unwrap_or_else(|| panic!("{path} is no text")).to_owned()
}

fn number(node: &Yaml<'_>, path: &str) -> i64 {
    at(node, path).as_integer().unwrap_or_else(|| panic!("{path} is no number"))
}

/// The one of a list that has this name.
fn named<'a, 'b>(list: &'a Yaml<'b>, name: &str) -> &'a Yaml<'b> {
    let mut all = list.as_vec().unwrap_or_else(|| panic!("a list of {name}")).iter();
    all.find(|one| text(one, "name") == name).unwrap_or_else(|| panic!("no {name}"))
}

/// One manifest and what the tests ask of it.
struct Manifest<'a> {
    documents: Vec<Yaml<'a>>,
    kind: &'static str,
    list: &'static str,
}

impl<'a> Manifest<'a> {
    fn document(&self, kind: &str) -> &Yaml<'a> {
        self.documents.iter().find(|document| text(document, "kind") == kind).unwrap_or_else(|| panic!("no {kind}"))
    }

    fn pod(&self) -> &Yaml<'a> {
        at(self.document(self.kind), "spec.template.spec")
    }

    fn container(&self) -> &Yaml<'a> {
        named(at(self.pod(), self.list), "pgcutover")
    }

    fn port(&self, name: &str) -> i64 {
        number(named(at(self.container(), "ports"), name), "containerPort")
    }

    fn mount(&self, name: &str) -> String {
        text(named(at(self.container(), "volumeMounts"), name), "mountPath")
    }

    /// The configuration, as the proxy reads it from the mounted files.
    fn config(&self) -> Config {
        let directory = TempDir::new().unwrap_or_else(|error| panic!("a directory: {error}"));
        let files = at(self.document("Secret"), "stringData");
        let names = ["pgcutover.toml", "userlist.txt"];
        names.iter().for_each(|name| {
            let content =
                files.as_mapping_get(name).and_then(|file| file.as_str()).unwrap_or_else(|| panic!("no {name}"));
            fs::write(directory.path().join(name), content).unwrap_or_else(|error| panic!("{name}: {error}"));
        });
        let config = Config::load(&directory.path().join(names[0])).unwrap_or_else(|error| panic!("{error}"));
        let users = config.general.auth_file.clone().expect("an auth_file");
        assert_eq!(users.file_name().and_then(|name| name.to_str()), Some(names[1]));
        assert!(users.exists(), "auth_file is beside the configuration");
        config
    }
}

fn each(check: impl Fn(&Manifest<'_>)) {
    for (file, kind, list) in MANIFESTS {
        let source = read(&format!("config/kubernetes/{file}"));
        let documents = Yaml::load_from_str(&source).unwrap_or_else(|error| panic!("{file}: {error}"));
        check(&Manifest { documents, kind, list });
    }
}

#[test]
fn ports_and_paths_of_the_manifests_are_those_of_the_configuration_in_them() {
    each(|manifest| {
        let general = manifest.config().general;
        assert_eq!(manifest.port("postgres"), i64::from(general.listen_port));
        let http = general.http_addr.expect("an http_addr");
        assert_eq!(http.rsplit(':').next(), Some(manifest.port("metrics").to_string().as_str()));
        assert!(!http.starts_with("127."), "probes come from outside the pod's loopback");
        assert_eq!(manifest.mount("state"), general.state_dir.to_str().unwrap());
        let argument = text(manifest.container(), "args.0");
        assert_eq!(argument, format!("{}/pgcutover.toml", manifest.mount("config")));
        for document in manifest.documents.iter().filter(|document| text(document, "kind") == "Service") {
            assert_eq!(number(document, "spec.ports.0.port"), i64::from(general.listen_port));
            assert_eq!(text(document, "spec.ports.0.targetPort"), "postgres");
        }
    });
}

#[test]
fn probes_ask_for_the_pages_that_there_are() {
    let pages = read("proxy/src/http.rs");
    each(|manifest| {
        for (probe, page) in [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")] {
            let request = at(manifest.container(), &format!("{probe}.httpGet"));
            assert_eq!((text(request, "path"), text(request, "port")), (page.to_owned(), "metrics".to_owned()));
            assert!(pages.contains(&format!("\"{page}\" =>")), "the proxy has no {page}");
        }
    });
}

/// A client that a cutover holds at SIGTERM is answered within its budget; as much again is for open transactions. Only then
/// may the process be killed.
#[test]
fn a_pod_gets_more_time_to_end_than_a_held_client_may_wait() {
    each(|manifest| {
        let grace = number(manifest.pod(), "terminationGracePeriodSeconds");
        let hook = manifest.container().as_mapping_get("lifecycle");
        let before = hook.map_or(0, |hook| number(hook, "preStop.sleep.seconds"));
        let general = manifest.config().general;
        let needed = Duration::from_secs(u64::try_from(before).unwrap()) + general.hold_budget + general.drain_timeout;
        assert!(Duration::from_secs(u64::try_from(grace).unwrap()) > 2 * needed, "{grace} s");
    });
}

#[test]
fn a_container_can_do_no_more_than_it_needs_and_its_state_outlives_it() {
    let dockerfile = read("Dockerfile");
    each(|manifest| {
        let own = at(manifest.container(), "securityContext");
        let pod = at(manifest.pod(), "securityContext");
        assert_eq!(at(own, "allowPrivilegeEscalation").as_bool(), Some(false));
        assert_eq!(at(own, "readOnlyRootFilesystem").as_bool(), Some(true));
        assert_eq!(text(own, "capabilities.drop.0"), "ALL");
        assert_eq!(at(pod, "runAsNonRoot").as_bool(), Some(true));
        assert_eq!(text(pod, "seccompProfile.type"), "RuntimeDefault");
        let user = own.as_mapping_get("runAsUser").or_else(|| pod.as_mapping_get("runAsUser"));
        let user = user.and_then(|user| user.as_integer()).expect("a user");
        assert!(dockerfile.contains(&format!("--uid {user}")), "the image has no user {user}");
        assert_eq!(number(pod, "fsGroup"), user, "it can write its volume");
    });
    each(|manifest| match manifest.kind {
        "Deployment" => {
            assert_eq!(text(manifest.container(), "restartPolicy"), "Always", "what makes it a sidecar");
            assert!(named(at(manifest.pod(), "volumes"), "state").as_mapping_get("emptyDir").is_some());
        }
        kind => {
            let claim = at(manifest.document(kind), "spec.volumeClaimTemplates.0.metadata.name");
            assert_eq!(claim.as_str(), Some("state"));
        }
    });
}

/// A unit of systemd.
struct Unit(String);

impl Unit {
    fn of(name: &str) -> Unit {
        Unit(read(&format!("config/systemd/{name}")))
    }

    /// The values of a key, in order.
    fn values(&self, key: &str) -> Vec<&str> {
        let prefix = format!("{key}=");
        self.0.lines().filter_map(|line| line.strip_prefix(prefix.as_str())).collect()
    }

    fn seconds(&self, key: &str) -> Duration {
        Duration::from_secs(self.values(key)[0].parse().unwrap_or_else(|error| panic!("{key}: {error}")))
    }
}

const PROXY: &str = "pgcutover.service";
const KEEPER: &str = "pgcutover-keeper@.service";

#[test]
fn the_unit_agrees_with_the_proxys_defaults_and_with_its_exit_codes() {
    let config = Config::load(&root().join("config/pgcutover.toml")).unwrap_or_else(|error| panic!("{error}"));
    let (general, unit) = (config.general, Unit::of(PROXY));
    assert_eq!(general.state_dir, Path::new("/var/lib").join(unit.values("StateDirectory")[0]));
    assert!(unit.seconds("TimeoutStopSec") > 2 * (general.hold_budget + general.drain_timeout));
    assert_eq!((unit.values("KillSignal"), unit.values("RestartPreventExitStatus")), (vec!["SIGTERM"], vec!["2"]));
    // It does not speak the service manager's protocol.
    assert_eq!(unit.values("Type"), ["exec"]);
    assert!(unit.values("ExecReload").iter().any(|command| command.contains("-HUP")));
    let file = "/etc/pgcutover/pgcutover.toml";
    let (start, before) = (unit.values("ExecStart")[0], unit.values("ExecStartPre")[0]);
    assert!(start.ends_with(file) && before.ends_with(&format!("--check {file}")));
}

/// `[[pgbouncer]]` is a comment there, because few have one.
#[test]
fn the_keepers_unit_runs_a_verb_that_there_is_and_may_write_the_file_of_the_example() {
    let path = root().join("config/cutover.toml");
    let text = read("config/cutover.toml");
    let (_, example) = text.split_once("# [[pgbouncer]]").expect("an example of a PgBouncer");
    let lines = example.lines().skip(1).take_while(|line| line.starts_with("# "));
    let entry: Vec<&str> = lines.map(|line| &line[2..]).filter(|line| !line.starts_with("command")).collect();
    let text = format!("{text}\n[[pgbouncer]]\n{}\n", entry.join("\n"));
    let config = proxyctl::config::Config::parse(&path, &text).unwrap_or_else(|error| panic!("{error}"));
    let bouncer = &config.bouncers[0];
    let Point::Template { file, .. } = &bouncer.point else { panic!("a file") };
    let unit = Unit::of(KEEPER);
    assert_eq!(file.parent(), Some(Path::new(unit.values("ReadWritePaths")[0])));
    let start = unit.values("ExecStart")[0].replace("%i", &bouncer.name);
    proxyctl::cli::Cli::try_parse_from(start.split(' ')).unwrap_or_else(|error| panic!("{start}: {error}"));
    assert!(unit.0.contains(&format!("\"/var/lib/{}\"", unit.values("StateDirectory")[0])), "journal_dir is said");
    // A hold that ends as it should is let go before the process may be killed.
    assert!(unit.seconds("TimeoutStopSec") > 2 * (config.budgets.lease + config.budgets.drain));
    let usage = proxyctl::printer::Exit::Usage.code().to_string();
    assert_eq!((unit.values("KillSignal"), unit.values("RestartPreventExitStatus")), (vec!["SIGTERM"], vec![&*usage]));
    assert_eq!((unit.values("Restart"), unit.values("StartLimitIntervalSec")), (vec!["always"], vec!["0"]));
}

#[test]
fn systemd_takes_the_units_where_there_is_one_to_ask() {
    let directory = TempDir::new().unwrap_or_else(|error| panic!("a directory: {error}"));
    for name in [PROXY, KEEPER] {
        let file = directory.path().join(name.replace('@', "@b1"));
        // The binaries are not installed here; everything else is looked at.
        let text =
            Unit::of(name).0.replace("/usr/bin/pgcutover", "/bin/true").replace("/usr/bin/proxyctl", "/bin/true");
        fs::write(&file, text).unwrap();
        let Ok(verdict) = Command::new("systemd-analyze").arg("verify").arg(&file).output() else {
            return e2e::printer::not_checked("the units of systemd", "there is no systemd-analyze here");
        };
        let said = String::from_utf8_lossy(&verdict.stderr);
        let about = file.file_name().and_then(|name| name.to_str()).unwrap();
        assert!(verdict.status.success() && !said.contains(&format!("{about}:")), "{said}");
    }
}
