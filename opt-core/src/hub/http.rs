//! Everything that knows the HTTP client.

use super::{HubOptions, ModelId, cache::is_commit};
use crate::{Error, ErrorKind};
use serde::Deserialize;
use std::{fmt::Write as _, io, io::Read, time::Duration};
use ureq::{
    Agent, Body,
    http::{HeaderMap, Response, StatusCode, header},
};

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 10;
/// The list of a repository's files is not believed to be longer.
const MAX_LISTING: u64 = 64 << 20;

/// A failure, and whether the hub could not be asked at all, so that the cache may answer in its place.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: Error,
    pub(super) unreachable: bool,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self { error, unreachable: false }
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}

type Asked<T> = std::result::Result<T, Refused>;

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Repository {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

/// What the hub announces of a file.
#[derive(Debug)]
pub(super) struct Announced {
    /// Names the content; usable as a file name.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
}

/// A file's content as it arrives.
pub(super) struct Content {
    /// The place of its first byte in the file: where it was asked to begin, or 0 from a server that cannot do that.
    pub(super) start: u64,
    reader: ureq::BodyReader<'static>,
    url: String,
    patience: Duration,
}

/// Why no more content came.
pub(super) struct Broken {
    pub(super) error: Error,
    /// The server fell silent: asking again would take as long again.
    pub(super) timed_out: bool,
}

impl Content {
    /// Reads the next bytes; 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> std::result::Result<usize, Broken> {
        loop {
            match self.reader.read(buffer) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let e = ureq::Error::from(e);
                    let timed_out = matches!(e, ureq::Error::Timeout(_));
                    return Err(Broken { error: network_error(&self.url, e, self.patience), timed_out });
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Http {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    patience: Duration,
}

impl Http {
    pub(super) fn new(options: &HubOptions) -> Self {
        let endpoint = options.endpoint.trim_end_matches('/').to_owned();
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here, where the token can be kept from other hosts.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("opt-core/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(options.connect_timeout))
            .timeout_recv_response(Some(options.read_timeout))
            .timeout_per_read(Some(options.read_timeout))
            .timeout_per_write(Some(options.read_timeout));
        // A proxy cannot reach what listens on this machine only.
        if ["localhost", "127.0.0.1", "[::1]"].contains(&host_and_port(&endpoint).0) {
            config = config.proxy(None);
        }
        Self {
            agent: config.build().new_agent(),
            endpoint,
            token: options.token.clone(),
            patience: options.read_timeout,
        }
    }

    /// The commit and the files of a model's revision.
    pub(super) fn repository(&self, id: &ModelId) -> Asked<Repository> {
        #[derive(Deserialize)]
        struct Listing {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url =
            format!("{}/api/models/{}/revision/{}", self.endpoint, id.name(), encode(id.revision(), false));
        let mut answer = self.get(&url, None, |_| true)?;
        if !answer.response.status().is_success() {
            return Err(self.refusal(id, None, &answer.response));
        }
        let not_hub = |what: String| {
            let message = format!("{}: expected the hub's description of {id}, found {what}", self.endpoint);
            Refused::from(Error::new(ErrorKind::Hub, message))
        };
        let body = answer.response.body_mut().with_config().limit(MAX_LISTING).read_to_vec();
        let body = body.map_err(|e| self.unreachable(&url, e))?;
        let listing: Listing = serde_json::from_slice(&body).map_err(|e| not_hub(e.to_string()))?;
        if !is_commit(&listing.sha) {
            return Err(not_hub(format!("the commit {:?}", listing.sha)));
        }
        Ok(Repository {
            commit: listing.sha,
            files: listing.siblings.into_iter().map(|s| s.rfilename).collect(),
        })
    }

    /// The name and size of a file's content. Large files redirect to another host; what counts then is what the hub
    /// says of them (`X-Linked-*`), not what that host says.
    pub(super) fn announced(&self, id: &ModelId, commit: &str, file: &str) -> Asked<Announced> {
        let url = self.file_url(id, commit, file);
        let mut linked: (Option<String>, Option<u64>) = (None, None);
        let answer = self.head(&url, |headers| {
            linked.0 = linked.0.take().or_else(|| text(headers, "x-linked-etag"));
            linked.1 = linked.1.or_else(|| number(headers, "x-linked-size"));
            linked.0.is_none()
        })?;
        let (status, headers) = (answer.response.status(), answer.response.headers());
        if !(status.is_success() || (status.is_redirection() && linked.0.is_some())) {
            return Err(self.refusal(id, Some(file), &answer.response));
        }
        let plain = |etag: String| etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let etag = linked.0.or_else(|| text(headers, "etag")).map(plain).unwrap_or_default();
        if !((1..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'))
        {
            let message = format!("{url}: expected an ETag that names the content, found {etag:?}");
            return Err(Error::new(ErrorKind::Hub, message).into());
        }
        let size = linked.1.or_else(|| number(headers, "content-length").filter(|_| status.is_success()));
        Ok(Announced { etag, size })
    }

    /// A file's content from byte `from` on, or from its beginning if the server knows no ranges.
    /// `None` where the file has no such byte.
    pub(super) fn content(
        &self,
        id: &ModelId,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Asked<Option<Content>> {
        let url = self.file_url(id, commit, file);
        let answer = self.get(&url, (from > 0).then_some(from), |_| true)?;
        let start = match answer.response.status() {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT => {
                let range = text(answer.response.headers(), "content-range").unwrap_or_default();
                let start =
                    range.strip_prefix("bytes ").and_then(|range| range.split('-').next()?.parse().ok());
                if start != Some(from) {
                    let message = format!("{url}: expected the bytes from {from} on, found {range:?}");
                    return Err(Error::new(ErrorKind::Hub, message).into());
                }
                from
            }
            StatusCode::RANGE_NOT_SATISFIABLE => return Ok(None),
            _ => return Err(self.refusal(id, Some(file), &answer.response)),
        };
        let reader = answer.response.into_body().into_reader();
        Ok(Some(Content { start, reader, url: answer.url, patience: self.patience }))
    }

    fn file_url(&self, id: &ModelId, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, id.name(), encode(file, true))
    }

    fn get(&self, url: &str, from: Option<u64>, follow: impl FnMut(&HeaderMap) -> bool) -> Asked<Answer> {
        self.request(url, follow, |url, token| {
            let mut request = self.agent.get(url);
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = token {
                request = request.header(header::AUTHORIZATION, token);
            }
            request.call()
        })
    }

    fn head(&self, url: &str, follow: impl FnMut(&HeaderMap) -> bool) -> Asked<Answer> {
        self.request(url, follow, |url, token| match token {
            Some(token) => self.agent.head(url).header(header::AUTHORIZATION, token).call(),
            None => self.agent.head(url).call(),
        })
    }

    /// Sends a request and follows redirects while `follow`, shown each answer's headers, says so.
    fn request(
        &self,
        url: &str,
        mut follow: impl FnMut(&HeaderMap) -> bool,
        send: impl Fn(&str, Option<&str>) -> std::result::Result<Response<Body>, ureq::Error>,
    ) -> Asked<Answer> {
        let bearer = self.token.as_ref().map(|token| format!("Bearer {token}"));
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            // The token is for the hub alone.
            let token = bearer.as_deref().filter(|_| origin(&url) == origin(&self.endpoint));
            let response = send(&url, token).map_err(|e| self.unreachable(&url, e))?;
            let go_on = follow(response.headers());
            let location =
                response.status().is_redirection().then(|| text(response.headers(), "location")).flatten();
            match location.filter(|_| go_on) {
                None => return Ok(Answer { response, url }),
                Some(location) => {
                    let next = join(&url, &location);
                    if !(next.starts_with("https://")
                        || (next.starts_with("http://") && url.starts_with("http://")))
                    {
                        let message = format!("{url}: redirects to {next:?}, expected an https address");
                        return Err(Error::new(ErrorKind::Hub, message).into());
                    }
                    url = next;
                }
            }
        }
        let message = format!("{url}: more than {MAX_REDIRECTS} redirects");
        Err(Error::new(ErrorKind::Hub, message).into())
    }

    fn unreachable(&self, url: &str, e: ureq::Error) -> Refused {
        let unreachable = !matches!(e, ureq::Error::BadUri(_) | ureq::Error::Http(_));
        Refused { error: network_error(url, e, self.patience), unreachable }
    }

    /// The error for an answer that is none.
    fn refusal(&self, id: &ModelId, file: Option<&str>, answer: &Response<Body>) -> Refused {
        let status = answer.status().as_u16();
        let code = text(answer.headers(), "x-error-code").unwrap_or_default();
        let what = file.map_or_else(|| id.to_string(), |file| format!("{id}: {file}"));
        let (kind, message) = match (code.as_str(), status) {
            ("RevisionNotFound", _) => {
                (ErrorKind::NotFound, format!("{} has no revision {:?}", id.name(), id.revision()))
            }
            ("EntryNotFound", _) => (ErrorKind::NotFound, format!("{what}: no such file in the repository")),
            (code, 401 | 403) => {
                let state =
                    if code == "GatedRepo" { "is gated" } else { "does not exist, or is private or gated" };
                let advice = match self.token {
                    None => "set HF_TOKEN to a token that may read it",
                    Some(_) => "the token that was sent (HF_TOKEN) may not read it",
                };
                (ErrorKind::Hub, format!("{what}: refused ({status}): the model {state}; {advice}"))
            }
            (_, 404) if file.is_none() => {
                (ErrorKind::NotFound, format!("{id}: no such model or revision on {}", self.endpoint))
            }
            (_, 404) => (ErrorKind::NotFound, format!("{what}: no such file in the repository")),
            _ => (ErrorKind::Hub, format!("{what}: {} answered {status}", self.endpoint)),
        };
        Refused { error: Error::new(kind, message), unreachable: status == 429 || status >= 500 }
    }
}

struct Answer {
    response: Response<Body>,
    /// Where it came from, after redirects.
    url: String,
}

fn network_error(url: &str, e: ureq::Error, patience: Duration) -> Error {
    let (host, _) = host_and_port(url);
    let message = match &e {
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            format!("{host} cannot be reached in time")
        }
        ureq::Error::Timeout(_) => format!("{host} was silent for {} s", patience.as_secs_f32()),
        ureq::Error::HostNotFound => format!("{host} cannot be reached (no network?)"),
        _ => format!("the connection to {host} failed"),
    };
    Error::because(ErrorKind::Hub, message, e)
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// Percent-encodes a path; its slashes too unless they separate parts.
fn encode(path: &str, slashes: bool) -> String {
    path.bytes().fold(String::with_capacity(path.len()), |mut out, b| {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) || (slashes && b == b'/') {
            out.push(char::from(b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
        out
    })
}

/// `scheme://host:port`
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url.get(host..).and_then(|rest| rest.find(['/', '?', '#'])).map_or(url.len(), |at| host + at);
    url.get(..end).unwrap_or(url)
}

fn host_and_port(url: &str) -> (&str, Option<&str>) {
    let authority = origin(url).split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.rsplit_once('@').map_or(authority, |(_, rest)| rest);
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// Where a `Location` leads from `url`.
fn join(url: &str, location: &str) -> String {
    let origin = origin(url);
    if location.contains("://") {
        location.to_owned()
    } else if let Some(rest) = location.strip_prefix("//") {
        let scheme = origin.split("://").next().unwrap_or("https");
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else {
        let path = url.split(['?', '#']).next().unwrap_or(url);
        let dir = path.rfind('/').filter(|at| *at >= origin.len()).map_or(path, |at| &path[..at]);
        format!("{dir}/{location}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(origin("https://h:8/a?b"), "https://h:8");
        assert_eq!(origin("https://h?x=/"), "https://h");
        assert_eq!(host_and_port("http://u:p@[::1]:80/x"), ("[::1]", Some("80")));
        assert_eq!(host_and_port("http://h/x:1"), ("h", None));
        assert_eq!(join("https://h/a/b?q=/", "/c"), "https://h/c");
        assert_eq!(join("https://h/a/b?q=/", "c"), "https://h/a/c");
        assert_eq!(join("https://h", "c"), "https://h/c");
        assert_eq!(join("https://h/a", "//k/c"), "https://k/c");
        assert_eq!(join("https://h/a", "http://k/c"), "http://k/c");
        assert_eq!(encode("refs/pr/3", false), "refs%2Fpr%2F3");
        assert_eq!(encode("a b/ü?.bin", true), "a%20b/%C3%BC%3F.bin");
    }
}
