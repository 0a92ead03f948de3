use crate::{Error, ErrorKind, Result};
use std::{
    env,
    ffi::OsString,
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the hub is, where its cache lies and how long to wait.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HubOptions {
    /// The cache directory, which holds `models--org--name` directories.
    pub cache: PathBuf,
    /// The hub's address.
    pub endpoint: String,
    /// The access token for gated and private models.
    pub token: Option<String>,
    /// Use the cache only; ask nobody.
    pub offline: bool,
    /// How long a connection may take to open. Default: 10 s.
    pub connect_timeout: Duration,
    /// How long the server may be silent, before its answer and within it. Default: 30 s.
    pub read_timeout: Duration,
    /// How often a download that broke off is continued within one call. Default: 5.
    pub retries: u32,
}

impl HubOptions {
    /// Defaults with this cache directory; nothing is taken from the environment.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            endpoint: "https://huggingface.co".into(),
            token: None,
            offline: false,
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
            retries: 5,
        }
    }

    /// What the environment says, as Python's `huggingface_hub` reads it: `HF_HUB_CACHE`, else `HF_HOME`/hub, else
    /// ~/.cache/huggingface/hub; `HF_ENDPOINT`; `HF_HUB_OFFLINE`; `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else
    /// `HF_HOME`/token.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] when nothing tells where the cache is.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let path = |name: &str| var(name).map(PathBuf::from);
        let user = || path("HOME").or_else(|| path("USERPROFILE"));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| user().map(|user| user.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Option,
                    "no place for the hub's cache: set HF_HOME, HF_HUB_CACHE or HOME",
                )
            })?;
        let text = |name: &str| var(name).and_then(|value| value.into_string().ok());
        let mut options = Self::new(cache);
        if let Some(endpoint) = text("HF_ENDPOINT") {
            options.endpoint = endpoint;
        }
        options.token = text("HF_TOKEN")
            .or_else(|| text("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| read_token(&path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")))?))
            .map(|token| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        options.offline = text("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str()));
        Ok(options)
    }
}

fn read_token(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

impl fmt::Debug for HubOptions {
    /// Shows whether there is a token, never the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("connect_timeout", &self.connect_timeout)
            .field("read_timeout", &self.read_timeout)
            .field("retries", &self.retries)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> HubOptions {
        let vars: Vec<(String, OsString)> = vars.iter().map(|(k, v)| (k.to_string(), v.into())).collect();
        HubOptions::from_vars(|name| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone())).unwrap()
    }

    #[test]
    fn places_and_switches() {
        let cache = |vars: &[(&str, &str)]| options(vars).cache.to_string_lossy().replace('\\', "/");
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), "/f/hub");
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]), "/c");
        assert_eq!(HubOptions::from_vars(|_| None).unwrap_err().kind(), ErrorKind::Option);
        assert!(options(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "true")]).offline);
        assert!(!options(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).offline);
        assert_eq!(options(&[("HOME", "/h"), ("HF_ENDPOINT", "http://m")]).endpoint, "http://m");
    }

    #[test]
    fn token_from_variable_or_file_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", home)]).token, None);
        fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(options(&[("HF_HOME", home)]).token.as_deref(), Some("hf_file"));
        let with_both = options(&[("HF_HOME", home), ("HF_TOKEN", " hf_secret ")]);
        assert_eq!(with_both.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{with_both:?}").contains("hf_secret"));
    }
}
