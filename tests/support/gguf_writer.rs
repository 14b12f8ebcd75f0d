//! Writes GGUF files for tests: valid ones, and ones that are wrong in one chosen place.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::Path;

/// GGUF's value type ids.
pub mod id {
    pub const U8: u32 = 0;
    pub const U16: u32 = 2;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const F64: u32 = 12;
}

/// A length and the text's bytes.
pub fn text_bytes(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// An array value: element type, count, elements.
pub fn array_bytes(element: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    let mut bytes = element.to_le_bytes().to_vec();
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(elements);
    bytes
}

#[derive(Clone)]
pub struct Entry {
    pub key: String,
    pub type_id: u32,
    pub value: Vec<u8>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Fastest first.
    pub dims: Vec<u64>,
    pub type_id: u32,
    pub data: Vec<u8>,
    /// Overrides the offset that follows from the order.
    pub offset: Option<u64>,
}

/// Every field can be set to something wrong before [`Gguf::bytes`].
#[derive(Clone)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    /// Overrides of the counts.
    pub tensor_count: Option<u64>,
    pub metadata_count: Option<u64>,
    pub entries: Vec<Entry>,
    pub tensors: Vec<Tensor>,
    /// How data is padded; a key is written only by [`Gguf::u32`].
    pub alignment: usize,
}

impl Default for Gguf {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            metadata_count: None,
            entries: Vec::new(),
            tensors: Vec::new(),
            alignment: 32,
        }
    }
}

impl Gguf {
    /// Adds or replaces a key with any value bytes.
    pub fn raw(&mut self, key: &str, type_id: u32, value: Vec<u8>) -> &mut Self {
        let entry = Entry { key: key.to_owned(), type_id, value };
        match self.entries.iter_mut().find(|entry| entry.key == key) {
            Some(found) => *found = entry,
            None => self.entries.push(entry),
        }
        self
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.raw(key, id::U32, value.to_le_bytes().to_vec())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.raw(key, id::F32, value.to_le_bytes().to_vec())
    }

    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.raw(key, id::BOOL, vec![u8::from(value)])
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, id::TEXT, text_bytes(value))
    }

    pub fn texts<T: AsRef<str>>(&mut self, key: &str, values: &[T]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|text| text_bytes(text.as_ref())).collect();
        self.raw(key, id::ARRAY, array_bytes(id::TEXT, values.len() as u64, &elements))
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.raw(key, id::ARRAY, array_bytes(id::I32, values.len() as u64, &elements))
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let elements: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.raw(key, id::ARRAY, array_bytes(id::F32, values.len() as u64, &elements))
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.entries.retain(|entry| entry.key != key);
        self
    }

    pub fn tensor(&mut self, name: &str, dims: &[u64], type_id: u32, data: Vec<u8>) -> &mut Self {
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(Tensor { name, dims, type_id, data, offset: None });
        self
    }

    pub fn remove_tensor(&mut self, name: &str) -> &mut Self {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    /// The tensor of a name, to be changed.
    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn pad(&self, bytes: &mut Vec<u8>) {
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
    }

    /// Magic, version, counts.
    fn start(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend_from_slice(&self.version.to_le_bytes());
        let tensors = self.tensor_count.unwrap_or(self.tensors.len() as u64);
        let entries = self.metadata_count.unwrap_or(self.entries.len() as u64);
        bytes.extend_from_slice(&tensors.to_le_bytes());
        bytes.extend_from_slice(&entries.to_le_bytes());
        bytes
    }

    /// The header with all tensor infos, and where each entry's value and each info starts.
    pub fn header(&self) -> (Vec<u8>, Vec<usize>, Vec<usize>) {
        let (mut values, mut infos) = (Vec::new(), Vec::new());
        let mut bytes = self.start();
        for entry in &self.entries {
            bytes.extend(text_bytes(&entry.key));
            bytes.extend_from_slice(&entry.type_id.to_le_bytes());
            values.push(bytes.len());
            bytes.extend_from_slice(&entry.value);
        }
        let mut running = 0_u64;
        for tensor in &self.tensors {
            infos.push(bytes.len());
            bytes.extend(text_bytes(&tensor.name));
            bytes.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| bytes.extend_from_slice(&dim.to_le_bytes()));
            bytes.extend_from_slice(&tensor.type_id.to_le_bytes());
            bytes.extend_from_slice(&tensor.offset.unwrap_or(running).to_le_bytes());
            running += (tensor.data.len() as u64).next_multiple_of(self.alignment as u64);
        }
        (bytes, values, infos)
    }

    /// Where the value bytes of a key start in the file.
    pub fn value_at(&self, key: &str) -> u64 {
        let index = self.entries.iter().position(|entry| entry.key == key);
        self.header().1[index.unwrap_or_else(|| panic!("no key {key}"))] as u64
    }

    /// Where the info of a tensor starts in the file.
    pub fn info_at(&self, name: &str) -> u64 {
        let index = self.tensors.iter().position(|tensor| tensor.name == name);
        self.header().2[index.unwrap_or_else(|| panic!("no tensor {name}"))] as u64
    }

    /// The whole file.
    pub fn bytes(&self) -> Vec<u8> {
        let (mut bytes, ..) = self.header();
        for tensor in &self.tensors {
            self.pad(&mut bytes);
            bytes.extend_from_slice(&tensor.data);
        }
        bytes
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}
