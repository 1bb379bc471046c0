//! Requests to the Hub or to a mirror of it. The length and the time of every response are limited, and the token
//! is sent only to the server's own address.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};
use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::names::{self, ModelId, quote};
use crate::{Error, ErrorKind, Result};

/// Maximum number of redirects for one file.
const MAX_REDIRECTS: usize = 5;
/// Bytes of an error response that are read.
const MAX_ERROR_BYTES: u64 = 2048;
/// Maximum size of the list of files, in bytes.
const MAX_LISTING_BYTES: u64 = 16 << 20;
/// Minimum rate of a download, in bytes per second.
const MIN_RATE: u64 = 8 << 10;

/// Time limits of requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// For connecting.
    pub(super) connect: Duration,
    /// Until the response starts, and between two reads of it.
    pub(super) read: Duration,
    /// For the body of a small response. The limit of a file also depends on its length.
    pub(super) body: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Timeouts { connect: seconds(20), read: seconds(60), body: seconds(600) }
    }
}

/// The headers of a file.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// The name of the blob; it was checked.
    pub(super) etag: String,
    /// The length in bytes, if it is known.
    pub(super) length: Option<u64>,
}

/// The commit and the files of a model.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// A client of one server.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    address: Uri,
    token: Option<String>,
    timeouts: Timeouts,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>, timeouts: Timeouts) -> Result<Self> {
        let address: Option<Uri> = endpoint.parse().ok().filter(is_web_address);
        let Some(address) = address.filter(|uri| uri.query().is_none()) else {
            return Err(Error::new(ErrorKind::Argument, "HF_ENDPOINT is not a web address")
                .expected("such as https://huggingface.co")
                .got(quote(endpoint)));
        };
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::new(ErrorKind::Argument, "the token of the Hub is malformed")
                .expected("printable ASCII characters without spaces")
                .hint("check HF_TOKEN, or log in again"));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed by this client, which checks each address first.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("llara/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.read))
            .timeout_per_read(Some(timeouts.read))
            .build()
            .new_agent();
        Ok(Client { agent, endpoint: endpoint.to_owned(), address, token, timeouts })
    }

    /// The files of a model at a revision.
    pub(super) fn list(&self, id: &ModelId) -> Result<Listing> {
        let revision = id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}", self.endpoint, id.path());
        let (mut response, _) = self.get(&url, id, Some(self.timeouts.body), "gzip")?;
        let mut bytes = Vec::new();
        let mut body = response.body_mut().as_reader().take(MAX_LISTING_BYTES + 1);
        body.read_to_end(&mut bytes).map_err(|e| broken(&url, &e))?;
        if bytes.len() as u64 > MAX_LISTING_BYTES {
            return Err(too_long(&url, MAX_LISTING_BYTES));
        }
        let listing = parse_listing(&bytes)?;
        if names::is_commit(&id.revision) && listing.commit != id.revision {
            return Err(answer("the server sent another commit", &url)
                .expected(&id.revision)
                .got(listing.commit));
        }
        Ok(listing)
    }

    /// Downloads a file of a commit. `sink` gets the headers and returns the writer for the contents, or
    /// `None` if they are not needed.
    pub(super) fn download<'w>(
        &self,
        id: &ModelId,
        commit: &str,
        name: &str,
        limit: u64,
        sink: impl FnOnce(&Head) -> Result<Option<&'w mut (dyn Write + 'w)>>,
    ) -> Result<Head> {
        let path = percent_encode(name);
        let url = format!("{}/{}/resolve/{commit}/{path}", self.endpoint, id.path());
        let (mut response, known) = self.get(&url, id, None, "identity")?;
        let head = head(&url, &response, &known, commit, limit)?;
        let Some(writer) = sink(&head)? else { return Ok(head) };
        let mut digest = names::is_sha256(&head.etag).then(|| Context::new(&SHA256));
        let most = head.length.unwrap_or(limit);
        let mut body = response.body_mut().as_reader().take(most.saturating_add(1));
        let mut buffer = vec![0; 1 << 16];
        let mut length = 0u64;
        let start = Instant::now();
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(broken(&url, &e)),
            };
            length += n as u64;
            if length > most {
                return Err(too_long(&url, most));
            }
            let limit = self.timeouts.body + Duration::from_secs(length / MIN_RATE);
            if start.elapsed() > limit {
                return Err(answer("the server sends too slowly", &url)
                    .expected(format!("{MIN_RATE} bytes a second"))
                    .got(format!("{length} bytes in {} seconds", start.elapsed().as_secs()))
                    .hint("try again, or download the model by other means and give its folder"));
            }
            if let Some(digest) = &mut digest {
                digest.update(&buffer[..n]);
            }
            writer
                .write_all(&buffer[..n])
                .map_err(|e| Error::io("write to the Hub's cache", name, e))?;
        }
        if head.length.is_some_and(|expected| expected != length) {
            return Err(answer("the server sent less than it announced", &url)
                .expected(format!("{most} bytes"))
                .got(format!("{length} bytes"))
                .hint("try again"));
        }
        if let Some(digest) = digest {
            let got: String =
                digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            if got != head.etag {
                return Err(answer("the hash of the file differs from the announced one", &url)
                    .expected(format!("SHA-256 {}", head.etag))
                    .got(format!("SHA-256 {got}"))
                    .hint("try again; if it persists, do not use this server"));
            }
        }
        Ok(head)
    }

    /// The response to a request after redirects, and the headers of the Hub's own responses.
    fn get(
        &self,
        url: &str,
        id: &ModelId,
        body_time: Option<Duration>,
        encoding: &str,
    ) -> Result<(Response<Body>, Known)> {
        let mut known = Known::default();
        let mut address: Uri =
            url.parse().map_err(|e| answer("invalid address", url).because(e))?;
        for _ in 0..=MAX_REDIRECTS {
            let own = same_server(&address, &self.address);
            let mut request = self.agent.get(&address).header("accept-encoding", encoding);
            if let Some(token) = self.token.as_ref().filter(|_| own) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let request = request.config().timeout_recv_body(body_time).build();
            let response = request.call().map_err(|e| {
                answer("cannot download", &address.to_string())
                    .because(e)
                    .hint("check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses only the cache")
            })?;
            if own {
                known.add(response.headers());
            }
            let status = response.status();
            if status.is_success() {
                return Ok((response, known));
            }
            if !status.is_redirection() {
                return Err(self.refused(status, response, &address, id));
            }
            let target = text(response.headers(), header::LOCATION.as_str()).unwrap_or_default();
            address = redirect(&address, &target).ok_or_else(|| {
                answer("the server redirects to an invalid address", &address.to_string())
                    .expected("an https address, or a path on the same server")
                    .got(quote(&target))
            })?;
        }
        Err(answer("too many redirects", url)
            .expected(format!("at most {MAX_REDIRECTS} redirects"))
            .hint("check HF_ENDPOINT"))
    }

    /// The error for a status other than success.
    fn refused(
        &self,
        status: StatusCode,
        mut response: Response<Body>,
        address: &Uri,
        id: &ModelId,
    ) -> Error {
        let headers = response.headers();
        let wait = text(headers, "retry-after").filter(|s| s.bytes().all(|b| b.is_ascii_digit()));
        let mut page = Vec::new();
        // The body only adds details to the status; a failed read is ignored.
        let _ = response.body_mut().as_reader().take(MAX_ERROR_BYTES).read_to_end(&mut page);
        let page = String::from_utf8_lossy(&page);
        let token =
            if self.token.is_some() { "check that HF_TOKEN may read it" } else { "set HF_TOKEN" };
        let hint = match status.as_u16() {
            401 | 403 => format!(
                "the model may be private or gated: accept its terms at {}/{}, and {token}",
                self.endpoint,
                id.path()
            ),
            404 => format!(
                "check the spelling of the model and of its revision `{}`; if it is private, {token}",
                id.revision
            ),
            429 => match wait {
                Some(seconds) if seconds.len() < 7 => {
                    format!("wait {seconds} seconds and try again")
                }
                _ => "the server limits requests: wait some minutes and try again".to_owned(),
            },
            500.. => "this is an error of the server: try again later".to_owned(),
            _ => "check HF_ENDPOINT".to_owned(),
        };
        let got = match page.trim() {
            "" => status.to_string(),
            page => format!("{status}: {}", quote(page)),
        };
        answer("the server refused the request", &address.to_string()).got(got).hint(hint)
    }
}

/// Headers of the Hub's own responses; the first of each name.
#[derive(Debug, Default)]
struct Known {
    linked_etag: Option<String>,
    linked_size: Option<String>,
    commit: Option<String>,
    etag: Option<String>,
}

impl Known {
    fn add(&mut self, headers: &HeaderMap) {
        let first = |slot: &mut Option<String>, name| {
            if slot.is_none() {
                *slot = text(headers, name);
            }
        };
        first(&mut self.linked_etag, "x-linked-etag");
        first(&mut self.linked_size, "x-linked-size");
        first(&mut self.commit, "x-repo-commit");
        first(&mut self.etag, "etag");
    }
}

/// Checks the headers of a file.
fn head(
    url: &str,
    response: &Response<Body>,
    known: &Known,
    commit: &str,
    limit: u64,
) -> Result<Head> {
    if let Some(named) = &known.commit
        && names::commit(named)? != commit
    {
        return Err(answer("the server sent another commit", url)
            .expected(commit)
            .got(quote(named)));
    }
    let own = text(response.headers(), "etag");
    let etag = known.linked_etag.as_ref().or(known.etag.as_ref()).or(own.as_ref());
    let Some(etag) = etag else {
        return Err(answer("the server sent no ETag for this file", url)
            .expected("an ETag or X-Linked-Etag header")
            .hint("check HF_ENDPOINT"));
    };
    let number = |name: &str, value: &str| {
        value.trim().parse::<u64>().map_err(|_| {
            answer("the server sent an invalid length", url)
                .expected(format!("an integer in {name}"))
                .got(quote(value))
        })
    };
    let encoded = text(response.headers(), "content-encoding").is_some_and(|e| e != "identity");
    let linked = match &known.linked_size {
        Some(size) => Some(number("X-Linked-Size", size)?),
        None => None,
    };
    let announced = match text(response.headers(), "content-length").filter(|_| !encoded) {
        Some(length) => Some(number("Content-Length", &length)?),
        None => None,
    };
    if let (Some(linked), Some(announced)) = (linked, announced)
        && linked != announced
    {
        return Err(answer("the server sent two different lengths for one file", url)
            .expected(format!("{linked} bytes, by X-Linked-Size"))
            .got(format!("{announced} bytes, by Content-Length")));
    }
    let length = linked.or(announced);
    if length.is_some_and(|length| length > limit) {
        return Err(too_long(url, limit).got(format!("{} bytes", length.unwrap_or(limit))));
    }
    Ok(Head { etag: names::etag(etag)?.to_owned(), length })
}

/// Parses the response to a request for a model's commit and files.
pub(super) fn parse_listing(bytes: &[u8]) -> Result<Listing> {
    #[derive(serde::Deserialize)]
    struct Raw {
        sha: String,
        siblings: Vec<Sibling>,
    }
    #[derive(serde::Deserialize)]
    struct Sibling {
        rfilename: String,
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| {
        Error::new(ErrorKind::Io, "the server's list of files is not valid")
            .because(e)
            .hint("check HF_ENDPOINT")
    })?;
    let files: Vec<String> = raw.siblings.into_iter().map(|file| file.rfilename).collect();
    for file in &files {
        names::repository_file(file)?;
    }
    Ok(Listing { commit: names::commit(&raw.sha)?.to_owned(), files })
}

/// The target of a redirect; `None` if it is invalid or leads from https to http.
fn redirect(from: &Uri, location: &str) -> Option<Uri> {
    let target = if location.starts_with('/') && !location.starts_with("//") {
        let (scheme, authority) = (from.scheme_str()?, from.authority()?);
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    let uri: Uri = target.parse().ok()?;
    let downgraded = from.scheme_str() == Some("https") && uri.scheme_str() != Some("https");
    (is_web_address(&uri) && !downgraded).then_some(uri)
}

/// An http or https address with a host and without a user name or password.
fn is_web_address(uri: &Uri) -> bool {
    matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.host().is_some_and(|host| !host.is_empty())
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
}

/// Whether both addresses have the same scheme, host and port.
fn same_server(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16().or(if uri.scheme_str() == Some("https") { Some(443) } else { Some(80) })
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme_str() == b.scheme_str() && host(a) == host(b) && port(a) == port(b)
}

fn percent_encode(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./".contains(&b);
    name.bytes()
        .map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// An error about the response for `url`.
fn answer(what: &str, url: &str) -> Error {
    // The query of a redirect contains a signature, which may be long and secret.
    let url = url.split(['?', '#']).next().unwrap_or_default();
    Error::new(ErrorKind::Io, format!("{what} ({})", url.escape_debug()))
}

fn broken(url: &str, source: &io::Error) -> Error {
    answer(&format!("the download was interrupted: {source}"), url)
        .hint("check the network and try again")
}

fn too_long(url: &str, limit: u64) -> Error {
    answer("the response is too long", url)
        .expected(format!("at most {limit} bytes"))
        .hint("check HF_ENDPOINT: do not use this server unless you trust it")
}
