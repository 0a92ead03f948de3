//! Passages in SQLite: texts and where they are from in a table, vectors in one of the extension sqlite-vec, which also
//! searches them.

use opt_core::{Error, ErrorKind, Result};
use rusqlite::{Connection, OpenFlags, Row, ffi::sqlite3_auto_extension, params};
use std::{path::Path, sync::Once};

/// A part of a text, and where it stands there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Passage {
    /// The file, from the folder that was indexed, with `/` between names.
    pub(crate) path: String,
    /// The bytes of the file that it is.
    pub(crate) start: i64,
    pub(crate) end: i64,
    /// How many tokens it has.
    pub(crate) tokens: i64,
    /// Its words with one space between them.
    pub(crate) text: String,
}

/// Passages, numbered from 0, with their vectors.
pub(crate) struct Store {
    db: Connection,
}

impl Store {
    /// A new database, filled with passages and their vectors.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn create<'a>(
        path: &Path,
        width: usize,
        rows: impl Iterator<Item = (&'a Passage, &'a [f32])>,
    ) -> Result<()> {
        load_extension();
        let write = || -> rusqlite::Result<()> {
            let mut db = Connection::open(path)?;
            // A new file under a name that nobody knows yet: if anything fails, it is thrown away.
            db.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")?;
            let all = db.transaction()?;
            all.execute_batch(&format!(
                "CREATE TABLE passages (
                     id INTEGER PRIMARY KEY,
                     path TEXT NOT NULL,
                     start INTEGER NOT NULL,
                     \"end\" INTEGER NOT NULL,
                     tokens INTEGER NOT NULL,
                     text TEXT NOT NULL
                 );
                 CREATE VIRTUAL TABLE vectors USING vec0 (embedding FLOAT[{width}] distance_metric=cosine);"
            ))?;
            {
                let mut passage = all.prepare("INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)")?;
                let mut vector = all.prepare("INSERT INTO vectors (rowid, embedding) VALUES (?, ?)")?;
                for (id, (p, numbers)) in (0i64..).zip(rows) {
                    passage.execute(params![id, p.path, p.start, p.end, p.tokens, p.text])?;
                    vector.execute(params![id, bytemuck::cast_slice::<f32, u8>(numbers)])?;
                }
            }
            all.commit()?;
            db.close().map_err(|(_, e)| e)
        };
        write().map_err(|e| Error::because(ErrorKind::Io, format_args!("{}", path.display()), e))
    }

    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn open(path: &Path) -> Result<Self> {
        load_extension();
        let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY);
        Ok(Self { db: db.map_err(failed)? })
    }

    /// The passage of a number.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], also if there is none.
    pub(crate) fn passage(&self, id: usize) -> Result<Passage> {
        let find = || -> rusqlite::Result<Passage> {
            let mut found = self.db.prepare("SELECT * FROM passages WHERE id = ?")?;
            found.query_row([id as i64], passage)
        };
        find().map_err(|e| failed(e).at(format_args!("passage {id}")))
    }

    /// All passages, by number.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn passages(&self) -> Result<Vec<Passage>> {
        let find = || -> rusqlite::Result<Vec<Passage>> {
            let mut found = self.db.prepare("SELECT * FROM passages ORDER BY id")?;
            found.query_map([], passage)?.collect()
        };
        find().map_err(failed)
    }

    /// The `k` vectors most like `query`, `[width]`, as number and cosine, best first: exact, one by one.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn nearest(&self, query: &[f32], k: usize) -> Result<Vec<(usize, f32)>> {
        let find = || -> rusqlite::Result<Vec<(usize, f32)>> {
            let mut found = self.db.prepare(
                "SELECT rowid, distance FROM vectors WHERE embedding MATCH ? AND k = ? ORDER BY distance",
            )?;
            let row = |row: &Row<'_>| Ok((row.get::<_, i64>(0)? as usize, 1.0 - row.get::<_, f32>(1)?));
            found.query_map(params![bytemuck::cast_slice::<f32, u8>(query), k as i64], row)?.collect()
        };
        find().map_err(failed)
    }
}

fn passage(row: &Row<'_>) -> rusqlite::Result<Passage> {
    Ok(Passage {
        path: row.get(1)?,
        start: row.get(2)?,
        end: row.get(3)?,
        tokens: row.get(4)?,
        text: row.get(5)?,
    })
}

fn failed(error: rusqlite::Error) -> Error {
    Error::because(ErrorKind::Io, "SQLite", error)
}

/// Makes sqlite-vec a part of every database that is opened from here on.
fn load_extension() {
    /// What SQLite calls for a database that is opened.
    type Begin = unsafe extern "C" fn(
        *mut rusqlite::ffi::sqlite3,
        *mut *mut std::ffi::c_char,
        *const rusqlite::ffi::sqlite3_api_routines,
    ) -> std::ffi::c_int;
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sqlite-vec.h declares this function with these arguments; the crate leaves them out. It was compiled
        // against the SQLite that is linked here (SQLITE_CORE), and lives as long as the program.
        unsafe {
            let begin = std::mem::transmute::<*const (), Begin>(sqlite_vec::sqlite3_vec_init as *const ());
            sqlite3_auto_extension(Some(begin));
        }
    });
}
